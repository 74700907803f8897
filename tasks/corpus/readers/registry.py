"""The reader of each format: `open_reader(domain, cache, …)` gives it, `.tasks(…)` and `.read(piece)` use it.

A record that cannot be read is a Reject under the rule it breaks, and reading goes on; only a file that cannot be
used at all raises. Whether that was too many is judged per domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks import plugin
from tasks.corpus.readers.base import Reader
from tasks.corpus.readers.dataset import DatasetReader
from tasks.corpus.readers.jsonl import JsonlReader
from tasks.corpus.readers.mediawiki import MediawikiReader
from tasks.corpus.readers.parquet import ParquetReader
from tasks.corpus.readers.text import TextReader

if TYPE_CHECKING:
    from tasks.settings import Domain

READERS: dict[str, type[Reader]] = {
    "text": TextReader,
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "mediawiki": MediawikiReader,
    "dataset": DatasetReader,
    **{name: module.Reader for name, module in plugin.modules("reader").items()},
}
"""The reader of each format; what it needs beyond the standard library is imported when it reads."""


def open_reader(domain: Domain, cache: Path, *, max_record_bytes: int, check: bool = True) -> Reader:
    """The reader of a domain, which rejects records (a line, file, row or page) of more than `max_record_bytes`.

    `cache` holds downloaded archives. `check` compares the sha256 of the source with the settings' (once is enough).

    Raises:
        SourceError: the source cannot be had or is not what was pinned.
        CorpusError: it is no source of this format.
    """
    return READERS[domain.format](domain, cache, max_record_bytes=max_record_bytes, check=check)

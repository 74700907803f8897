"""Records out of an Arrow column of strings, for the readers of parquet and of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tasks.corpus.records import Document, Record, Reject

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 1 << 22
"""About what a batch of rows should hold."""


def column_records(column: pa.Array, name: str, field: str, *, first: int, most: int) -> Iterator[Record]:
    """One record for each value of a column of the file `name`, from row `first`; `most` is max_record_bytes."""
    for row, value in enumerate(column, start=first):
        rule, detail = "", ""
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            rule, detail = "invalid UTF-8", str(error)
        else:
            if text is None:
                rule, detail = "null field", f"{field!r} is null"
            elif not isinstance(text, str):
                rule, detail = "not a string", f"{field!r} is a {type(text).__name__}"
        if rule:
            yield Reject(rule=rule, source=name, row=row, detail=detail)
        else:
            yield Document(text=text, source=name, row=row)

"""Hugging Face datasets, streamed: of the hub, pinned to a commit, or in a local folder. A shard is a piece.

No code of a dataset is ever run: `datasets` has no loading scripts any more.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import sources
from tasks.corpus.readers.base import Piece, Reader, Records, grouped
from tasks.corpus.readers.column import column_records
from tasks.corpus.readers.streams import ReadError
from tasks.corpus.records import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.settings import Domain

BATCH_ROWS = 1024


class DatasetReader(Reader):
    """The column `text_field` of one split. Rows are called `NAME@COMMIT#shard` or `FOLDER#shard`, and a number."""

    def __init__(self, domain: Domain, cache: Path, *, max_record_bytes: int, check: bool) -> None:
        from datasets import load_dataset_builder

        self.source, self.field, self.max_record_bytes = domain.source, domain.text_field, max_record_bytes
        split = domain.split or "train"
        path, revision, self.name, self._fetched = _located(domain, cache, check=check)
        try:
            builder = load_dataset_builder(path, name=domain.subset, revision=revision)
            dataset = builder.as_streaming_dataset(split=split)
        except Exception as error:  # its stores and formats each have their own; all of them say what is wrong
            raise sources.SourceError(f"source {domain.source!r} (split {split!r}): {error}") from error
        self._require_column(dataset.column_names)
        if hasattr(builder.config, "columns"):  # parquet: the others need not be read
            builder.config.columns, builder.config.batch_size = [self.field], BATCH_ROWS
            dataset = builder.as_streaming_dataset(split=split)
        self.dataset = dataset.with_format("arrow")
        files = {str(name): paths for name, paths in (builder.config.data_files or {}).items()}
        known = (builder.info.splits or {}).get(split)
        self._bytes: int = known.num_bytes if known else sum(map(_local_size, files.get(split, [])))

    def tasks(self, *, task_bytes: int) -> list[tuple[Piece, ...]]:
        shards = range(self.dataset.num_shards)
        pieces = [Piece(f"{self.name}#{shard}", shard, shard + 1) for shard in shards]
        # A dataset that does not tell its size has one shard a task.
        return grouped(((piece, self.size(piece) or task_bytes) for piece in pieces), task_bytes=task_bytes)

    def fetched(self, task: tuple[Piece, ...]) -> sources.Fetched | None:
        return self._fetched

    def size(self, piece: Piece) -> int:
        shards: int = self.dataset.num_shards
        return self._bytes // shards

    def read(self, piece: Piece) -> Records:
        row = 0
        for table in self._tables(piece):
            self._require_column(table.column_names)
            for chunk in table.column(self.field).chunks:
                yield from column_records(chunk, piece.path, field=self.field, first=row, most=self.max_record_bytes)
                row += len(chunk)
        return row

    def _tables(self, piece: Piece) -> Iterator[pa.Table]:
        import pyarrow as pa

        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=piece.start)
        try:
            yield from shard.iter(batch_size=BATCH_ROWS)
        except (ValueError, EOFError, zlib.error, pa.ArrowException) as error:
            raise CorpusError(f"{piece.path}: cannot be read ({error}); mend or leave out that file") from error
        except Exception as error:  # a store or a network, each of which has errors of its own
            message = f"{piece.path}: reading failed ({type(error).__name__}: {error})"
            raise ReadError(f"{message}; run again, finished parts are kept") from error

    def _require_column(self, names: list[str] | None) -> None:
        if names is not None and self.field not in names:
            raise CorpusError(f"{self.source}: has no column {self.field!r}; set text_field to one of {names}")


def _located(domain: Domain, cache: Path, *, check: bool) -> tuple[str, str | None, str, sources.Fetched | None]:
    """Where a dataset is, its commit if it is on the hub, what it is called in the records, its files if local."""
    source = sources.parse(domain.source)
    if source.kind == "hub":
        sources.require_commit(source)
        if domain.sha256:
            raise sources.SourceError(f"source {domain.source!r}: its commit pins it; leave sha256 out")
        return source.name, source.version, f"{source.name}@{source.version}", None
    if source.kind != "dir" or not os.path.isdir(source.path):
        raise sources.SourceError(
            f"source {domain.source!r}: format dataset reads hub:ORG/NAME@COMMIT or the dir: of a folder"
        )
    fetched = sources.fetch(domain.source, cache, sha256=domain.sha256 if check else None)
    return source.path, None, Path(source.path).resolve().name, fetched


def _local_size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0

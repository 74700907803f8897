"""Parquet: one column of strings, cut into ranges of row groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from tasks.corpus.readers import streams
from tasks.corpus.readers.base import Piece, Records, UnitReader
from tasks.corpus.readers.column import column_records
from tasks.corpus.records import CorpusError

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

    from tasks.settings import Domain


BATCH_BYTES = 1 << 22
"""About what a batch of rows should hold."""


class ParquetReader(UnitReader):
    """The column `text_field`; the others are not read."""

    def __init__(self, domain: Domain, cache: Path, *, max_record_bytes: int, check: bool) -> None:
        super().__init__(domain, cache, max_record_bytes=max_record_bytes, check=check)
        self._group_sizes: dict[str, NDArray[np.int64]] = {}

    def records(self, file: IO[bytes], piece: Piece) -> Records:
        name = piece.path
        row = 0
        with self._table(file, name) as table:
            groups = list(range(table.num_row_groups))[piece.start : piece.stop]
            decoded = sum(self._chunk_bytes(table, groups, of="total_uncompressed_size"))
            rows = sum(table.metadata.row_group(i).num_rows for i in groups)
            batch_rows = max(1, min(1024, BATCH_BYTES * rows // max(decoded, 1)))
            for batch in table.iter_batches(batch_size=batch_rows, row_groups=groups, columns=[self.field]):
                column = batch.column(0)
                yield from column_records(column, name, field=self.field, first=row, most=self.max_record_bytes)
                row += len(batch)
        return row

    def unit_bytes(self, name: str) -> NDArray[np.int64]:
        """Compressed bytes of the column in each row group."""
        if name not in self._group_sizes:
            with self.open(name) as file, self._table(file, name) as table:
                sizes = self._chunk_bytes(table, range(table.num_row_groups), of="total_compressed_size")
            self._group_sizes[name] = np.array(sizes, dtype=np.int64)
        return self._group_sizes[name]

    def _chunk_bytes(self, table: pq.ParquetFile, groups: Iterable[int], *, of: str) -> list[int]:
        """Bytes of the column in each row group; a nested one, which is no text, is several in the file."""
        sizes = []
        for group in map(table.metadata.row_group, groups):
            chunks = [group.column(i) for i in range(group.num_columns)]
            sizes.append(sum(getattr(c, of) for c in chunks if f"{c.path_in_schema}.".startswith(f"{self.field}.")))
        return sizes

    @contextmanager
    def _table(self, file: IO[bytes], name: str) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file, buffer_size=streams.BLOCK)
            if self.field not in (names := table.schema_arrow.names):
                raise CorpusError(f"{name}: has no column {self.field!r}; set text_field to one of {names}")
            yield table
        except (pa.ArrowException, OSError) as error:  # its index is at the end, so nothing of it can be trusted
            raise CorpusError(f"{name}: not a readable parquet file ({error}); fetch it again") from error

"""Records out of an Arrow column of strings, for the readers of parquet and of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tasks.corpus.records import NUL_RULE, Document, Record, Reject, stray_nul_fault

if TYPE_CHECKING:
    import pyarrow as pa


def column_records(column: pa.Array, name: str, *, field: str, first: int, most: int) -> Iterator[Record]:
    """A record for each value of a column, or of part of it.

    Args:
        column: the values; strings of any of Arrow's kinds, or every record is a Reject.
        name: what the file is called in the records.
        field: the column's name.
        first: the row of the first value.
        most: bytes that a value may have.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = column.type in {pa.string(), pa.large_string(), pa.string_view()}
    if is_text:
        column = column.cast(pa.large_string())
    sizes = pc.binary_length(column).to_pylist() if is_text else [0] * len(column)
    for row, (value, size) in enumerate(zip(column, sizes, strict=True), start=first):
        rule = detail = ""
        if not value.is_valid:
            rule, detail = "null field", f"{field!r} is null"
        elif not is_text:
            rule, detail = "not a string", f"{field!r} is of type {column.type}"
        elif size > most:
            rule, detail = "over-long record", f"{size} bytes, more than max_record_bytes = {most}"
        else:
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                rule, detail = "invalid UTF-8", str(error)
            else:
                if fault := stray_nul_fault(text):
                    rule, detail = NUL_RULE, fault
        if rule:
            yield Reject(rule=rule, source=name, row=row, detail=detail)
        else:
            yield Document(text=text, source=name, row=row)

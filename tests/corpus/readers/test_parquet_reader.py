from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus.records import CorpusError
from tests.corpus.readers.reading import read, reader_of, records_of
from tests.corpus.texts import sentences


def test_parquet_gives_its_text_column_with_nulls_rejected(tmp_path: Path) -> None:
    texts = sentences(3000, seed=5)
    column = [None if i == 1500 else text for i, text in enumerate(texts)]
    pq.write_table(pa.table({"id": range(3000), "body": column}), tmp_path / "a.parquet", row_group_size=700)
    result, rejects = read(tmp_path, format="parquet", text_field="body")
    assert [document.text for document in result] == texts[:1500] + texts[1501:]
    assert result[-1].row == 2999
    assert [(reject.rule, reject.source, reject.row) for reject in rejects] == [("null field", "a.parquet", 1500)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", "zwölf", "", "one"]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path, format="parquet")[0]] == texts


@pytest.mark.parametrize(
    ("column", "rule"),
    [
        (pa.array([1, 2]), "not a string"),
        (pa.array([["a"], ["b"]]), "not a string"),
        (pa.array([b"a", b"b"]), "not a string"),
        (pa.array([b"\xff", b"\xfe"]).view(pa.string()), "invalid UTF-8"),
        (pa.array(["é" * 51, "a" * 101]), "over-long record"),
        (pa.array(["\0".join("words"), "w\0\0"]), "NUL characters"),
    ],
)
def test_values_that_are_no_text_are_rejected_one_by_one(tmp_path: Path, column: pa.Array, rule: str) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    result, rejects = read(tmp_path, format="parquet", max_record_bytes=100)
    assert (result, [(reject.rule, reject.row) for reject in rejects]) == ([], [(rule, 0), (rule, 1)])


def test_parquet_that_lacks_the_column_or_its_tail_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(
        CorpusError, match=r"a.parquet: has no column 'text'; set text_field to one of \['id', 'body'\]"
    ):
        read(path, format="parquet")
    path.write_bytes(path.read_bytes()[:-5])
    for task_bytes in (1, 1 << 20):
        with pytest.raises(CorpusError, match=r"a.parquet: not a readable parquet file .*fetch it again"):
            records_of(reader_of(path, format="parquet", text_field="body"), task_bytes=task_bytes)


def test_damage_inside_a_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": sentences(500, seed=6)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[2000:2200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"a.parquet: not a readable parquet file"):
        read(path, format="parquet")


@given(
    groups=st.lists(st.lists(st.one_of(st.none(), st.text(max_size=30)), max_size=5), min_size=1, max_size=6),
    task_bytes=st.integers(1, 300),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_do_not_depend_on_how_row_groups_are_shared_out(
    tmp_path: Path, groups: list[list[Any]], task_bytes: int
) -> None:
    schema = pa.schema({"text": pa.string(), "n": pa.int64()})
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for group in groups:
            texts = [text and text.encode(errors="ignore").decode() for text in group]
            writer.write_table(pa.table({"text": texts, "n": range(len(group))}, schema=schema))
    reader = reader_of(tmp_path, format="parquet")
    assert records_of(reader, task_bytes=task_bytes) == records_of(reader)
    assert [record.row for record in records_of(reader)] == list(range(sum(map(len, groups))))


def test_a_piece_has_about_task_bytes_of_the_text_column_alone(tmp_path: Path) -> None:
    texts = ["".join(chr(33 + (i * j) % 90) for j in range(100)) for i in range(1000)]
    table = pa.table({"text": texts, "other": [text * 20 for text in texts]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="none", use_dictionary=False)
    reader = reader_of(tmp_path, format="parquet")
    pieces = [task[0] for task in reader.tasks(task_bytes=50_000)]
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 5), (5, 10)]
    assert all(50_000 < reader.size(piece) < 60_000 for piece in pieces)

"""Sources on a web server, with and without byte ranges."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.corpus.readers.streams import ReadError
from tasks.corpus.records import Document
from tests.corpus.readers.reading import lines, reader_of, records_of
from tests.corpus.texts import sentences
from tests.servers import Ranges, Whole, serving

TEXTS = sentences(32_000, seed=8)


Serve = Callable[[type[Whole]], str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server of `tmp_path`; returns its address."""
    with ExitStack() as stack:
        yield lambda handler: stack.enter_context(serving(tmp_path, handler))


def test_json_lines_are_cut_where_the_server_gives_ranges(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    reader = reader_of(f"{serve(Ranges)}/a.jsonl")
    tasks = reader.tasks(task_bytes=1 << 20)
    assert len(tasks) == -((tmp_path / "a.jsonl").stat().st_size // -(1 << 20)) > 3
    result = records_of(reader, task_bytes=1 << 20)
    assert [record.text for record in result if isinstance(record, Document)] == TEXTS
    assert [record.row for record in result] == list(range(len(TEXTS)))
    assert result[0].source.endswith("/a.jsonl")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_are_streamed_whole_from_a_server_without_ranges(tmp_path: Path, serve: Serve, ending: str) -> None:
    content = lines(TEXTS)
    (tmp_path / f"a.jsonl{ending}").write_bytes(gzip.compress(content, 1) if ending else content)
    assert len(content) > 5 << 20  # more than a block of fsspec's
    reader = reader_of(f"{serve(Whole)}/a.jsonl{ending}")
    assert len(reader.tasks(task_bytes=1 << 20)) == 1
    result = records_of(reader)
    assert [record.text for record in result if isinstance(record, Document)] == TEXTS
    assert Whole.ranges[-1] == ""


def test_parquet_is_read_by_ranges_and_refused_without(tmp_path: Path, serve: Serve) -> None:
    table = pa.table({"text": TEXTS, "other": [text[::-1] for text in TEXTS]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5000, compression="none", use_dictionary=False)
    reader = reader_of(f"{serve(Ranges)}/a.parquet", format="parquet")
    assert len(reader.tasks(task_bytes=1 << 20)) > 3
    result = records_of(reader, task_bytes=1 << 20)
    assert [record.text for record in result if isinstance(record, Document)] == TEXTS
    reader = reader_of(f"{serve(Whole)}/a.parquet", format="parquet")
    with pytest.raises(ReadError, match=r"a.parquet: reading failed .*doesn't appear to support range requests"):
        records_of(reader)


def test_a_connection_that_breaks_is_an_error_and_not_a_bad_record(tmp_path: Path, serve: Serve) -> None:
    class Breaking(Whole):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(lines(["one"]))

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()

    reader = reader_of(f"{serve(Breaking)}/a.jsonl")
    with pytest.raises(ReadError, match=r"a.jsonl: reading failed \(.*run again"):
        records_of(reader)


def test_a_file_whose_size_the_server_does_not_tell_is_read_to_its_end(tmp_path: Path, serve: Serve) -> None:
    texts = TEXTS[:500]
    content = gzip.compress(lines(texts))

    class Silent(Whole):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

    reader = reader_of(f"{serve(Silent)}/a.jsonl.gz?signature=x")
    result = records_of(reader, task_bytes=100)
    assert [record.text for record in result if isinstance(record, Document)] == texts

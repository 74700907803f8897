from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.corpus.readers.reading import read, reader_of, records_of


def test_a_text_file_is_a_document_and_an_invalid_one_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffgrün\r\n".encode())
    (tmp_path / "b.txt").write_bytes(b"gr\xfcn")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed")[:-3])
    (tmp_path / "e.txt").write_bytes(b"")
    result, rejects = read(tmp_path, format="text")
    assert [(d.text, d.source, d.row) for d in result] == [
        ("grün\r\n", "a.txt", 0),
        ("packed", "c.txt.gz", 0),
        ("", "e.txt", 0),
    ]
    assert [(r.rule, r.source) for r in rejects] == [("invalid UTF-8", "b.txt"), ("corrupt stream", "d.txt.gz")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32"])
def test_a_file_in_utf_16_or_32_is_bad_with_or_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    for name, text in {"a": "plain words\n", "b": "größer, κόσμος\n", "c": "日本語\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode(encoding))
    result, rejects = read(tmp_path, format="text")
    assert result == []
    assert {reject.rule for reject in rejects} <= {"NUL characters", "invalid UTF-8"}
    assert all(reject.bad for reject in rejects)
    if encoding == "utf-16-le":
        assert rejects[0].detail.startswith("12 of 24 characters are NUL, the first at 1; UTF-16 or UTF-32, perhaps")


def test_a_text_file_may_have_exactly_max_record_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 100)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a" * 101))
    result, rejects = read(tmp_path, format="text", max_record_bytes=100)
    assert [document.source for document in result] == ["a.txt"]
    assert [(reject.rule, reject.source) for reject in rejects] == [("over-long record", "b.txt.gz")]


def test_text_files_are_never_cut_and_names_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    for name in ("x/a.txt", "x/b.txt", "y/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name * 10)
    reader = reader_of(tmp_path, format="text")
    tasks = reader.tasks(task_bytes=140)
    assert [[piece.path for piece in task] for task in tasks] == [["x/a.txt", "x/b.txt"], ["y/c.txt"]]
    assert records_of(reader, task_bytes=1) == records_of(reader)

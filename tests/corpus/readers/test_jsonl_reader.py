from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus.readers import streams
from tasks.corpus.readers.base import FileReader, Piece
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import Document, Reject
from tasks.settings.corpus import Domain
from tests.corpus.readers.reading import COMPRESS, lines, read, reader_of, records_of
from tests.corpus.texts import sentences

TMP_PATH = HealthCheck.function_scoped_fixture


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_are_read_at_any_compression(tmp_path: Path, ending: str) -> None:
    texts = sentences(500, seed=1)
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines(texts)))
    result, rejects = read(tmp_path)
    assert [document.text for document in result] == texts
    assert [document.row for document in result] == list(range(500))
    assert {document.source for document in result} == {f"a.jsonl{ending}"}
    assert rejects == []


def test_a_stray_nul_may_stand_in_a_string_and_text_in_utf_16_may_not(tmp_path: Path) -> None:
    good = ["one\0 stray", "x" * 300 + "\0" + "y" * 300 + "\0"]
    bad = ["\0".join("plain words"), "\0" * 5, "a\0\0"]
    (tmp_path / "a.jsonl").write_bytes(lines([*good, *bad]))
    (tmp_path / "b.jsonl").write_bytes(lines(["plain words"]).decode().encode("utf-16-le"))
    result, rejects = read(tmp_path)
    assert [document.text for document in result] == good
    assert [(r.rule, r.source, r.row) for r in rejects if r.source == "a.jsonl"] == [
        ("NUL characters", "a.jsonl", row) for row in (2, 3, 4)
    ]
    assert {r.rule for r in rejects if r.source == "b.jsonl"} == {"invalid JSON"}
    assert all(r.bad for r in rejects)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_of_several_frames_is_read_to_its_end(tmp_path: Path, ending: str) -> None:
    texts = sentences(90, seed=2)
    frames = [COMPRESS[ending](lines(texts[i : i + 30])) for i in (0, 30, 60)]
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"".join(frames))
    result, rejects = read(tmp_path)
    assert [document.text for document in result] == texts
    assert rejects == []


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=10, suppress_health_check=[TMP_PATH])
def test_a_compressed_stream_cut_anywhere_is_counted_and_never_passes_for_whole(
    tmp_path: Path, ending: str, share: float
) -> None:
    texts = sentences(200, seed=3)
    whole = COMPRESS[ending](lines(texts))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(whole[: int(share * len(whole))])
    result, rejects = read(path)
    assert [document.text for document in result] == texts[: len(result)]
    assert [(r.rule, r.source, r.row, r.bad) for r in rejects] == [("corrupt stream", path.name, len(result), True)]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_a_flipped_byte_in_a_compressed_stream_is_counted(tmp_path: Path, ending: str) -> None:
    whole = bytearray(COMPRESS[ending](lines(sentences(200, seed=4))))
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole)
    assert read(tmp_path)[1]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b'{"text": "\xff\xfe"}', "invalid JSON"),
        (b'{"text": "\\ud800"}', "invalid JSON"),
        (b'["text"]', "not an object"),
        (b'{"body": "a", "id": 1}', "missing field"),
        (b'{"text": null}', "null field"),
        (b'{"text": 5}', "not a string"),
        (b'{"text": "' + b"a" * 1000 + b'"}', "over-long record"),
    ],
)
def test_a_bad_line_is_a_reject_under_its_rule_and_the_rest_is_read(tmp_path: Path, line: bytes, rule: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]) + line + b"\n\n" + lines(["two"]))
    result, rejects = read(tmp_path, max_record_bytes=1000)
    assert [(document.text, document.row) for document in result] == [("one", 0), ("two", 3)]
    assert [(reject.rule, reject.source, reject.row, reject.bad) for reject in rejects] == [(rule, "a.jsonl", 1, True)]
    assert rejects[0].detail


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_may_have_exactly_max_record_bytes(tmp_path: Path, more: int, end: bytes) -> None:
    line = b'{"text": "aaaa"}' + b" " * more
    (tmp_path / "a.jsonl").write_bytes(line + end)
    result, rejects = read(tmp_path, max_record_bytes=16)
    assert (len(result), [reject.rule for reject in rejects]) == ((1, []), (0, ["over-long record"]))[more]


class _Counted(io.RawIOBase):
    """An endless line, which notes how much of it was asked for at once."""

    def __init__(self, size: int) -> None:
        self.left, self.most = size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self.left)
        self.most = max(self.most, len(buffer))
        buffer[:n] = b"a" * n
        self.left -= n
        return n


def test_an_over_long_line_is_passed_over_in_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x")
    reader = reader_of(tmp_path, max_record_bytes=1000)
    assert isinstance(reader, FileReader)
    endless = _Counted(1 << 27)
    monkeypatch.setattr(type(reader.fs), "open", lambda *_, **__: endless)
    assert [record.rule for record in records_of(reader) if isinstance(record, Reject)] == ["over-long record"]
    assert (endless.left, endless.most) == (0, streams.BLOCK)


def test_a_zstd_stream_that_expands_without_end_is_never_held(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(1 << 8)) + compressor.flush()
    assert len(packed) < 100_000  # of 256 MB
    before = pa.total_allocated_bytes()
    file = streams.decompress(io.BytesIO(packed), "a.zst")
    assert len(file.readline(1000)) == 1000
    assert pa.total_allocated_bytes() - before < 1 << 22
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    result, rejects = read(tmp_path)
    assert (result, [reject.rule for reject in rejects]) == ([], ["over-long record"])


@given(
    content=st.lists(
        st.one_of(
            st.just(b""),
            st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")),
            st.text(max_size=12).map(lambda text: lines([text.encode(errors="ignore").decode()])[:-1]),
        ),
        max_size=20,
    ).map(b"\n".join),
    task_bytes=st.integers(1, 60),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[TMP_PATH])
def test_records_and_rows_do_not_depend_on_where_a_file_is_cut(
    tmp_path: Path, content: bytes, task_bytes: int
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(content)
    reader = reader_of(tmp_path, max_record_bytes=40)
    assert records_of(reader, task_bytes=task_bytes) == records_of(reader)
    plain = [i for i, line in enumerate(content.split(b"\n")) if line and not line.isspace()]
    assert [record.row for record in records_of(reader)] == plain * 2


def test_big_plain_files_are_cut_and_small_ones_are_grouped_in_order(tmp_path: Path) -> None:
    for name, size in {"a": 10, "b": 250, "c": 30, "d": 60, "e": 20}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n" * size)
    (tmp_path / "f.jsonl.gz").write_bytes(b"\n" * 250)
    reader = reader_of(tmp_path)
    tasks = reader.tasks(task_bytes=100)
    assert [[(p.path[0], p.start, p.stop) for p in task] for task in tasks] == [
        [("a", 0, None)],
        [("b", 0, 100)],
        [("b", 100, 200)],
        [("b", 200, 250), ("c", 0, None)],
        [("d", 0, None), ("e", 0, None)],
        [("f", 0, None)],
    ]
    assert [sum(map(reader.size, task)) for task in tasks] == [10, 100, 100, 80, 80, 250]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_members_of_archives_are_one_piece_each(tmp_path: Path, ending: str) -> None:
    texts = sentences(50, seed=5)
    with zipfile.ZipFile(tmp_path / "texts.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"a/one.jsonl{ending}", COMPRESS[ending](lines(texts)))
    reader = reader_of(f"zip://a/*.jsonl*::file://{tmp_path}/texts.zip")
    assert reader.tasks(task_bytes=10) == [(Piece(f"a/one.jsonl{ending}"),)]
    assert [record.text for record in records_of(reader) if isinstance(record, Document)] == texts


@pytest.mark.parametrize(("name", "format"), [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.xml", "mediawiki")])
def test_a_store_that_fails_midway_is_an_error_and_not_a_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str
) -> None:
    class Failing(io.RawIOBase):
        def __init__(self, content: bytes) -> None:
            self._left = content

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            if not self._left:
                raise ConnectionResetError("gone")
            content, self._left = self._left, b""
            return content

    content = COMPRESS[".gz" if name.endswith("gz") else ""](b"<mediawiki>" if format == "mediawiki" else lines(["a"]))
    (tmp_path / name).write_bytes(content)
    reader = reader_of(tmp_path / name, format=format)
    assert isinstance(reader, FileReader)
    monkeypatch.setattr(type(reader.fs), "open", lambda *_, **__: Failing(content[:-5]))
    with pytest.raises(streams.ReadError, match=rf"{name}: reading failed \(ConnectionResetError: gone\); run again"):
        records_of(reader)


def test_a_file_that_is_gone_is_a_read_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]))
    reader = reader_of(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(streams.ReadError, match=r"a.jsonl: reading failed \(FileNotFoundError"):
        records_of(reader)


def test_workers_need_not_check_the_digest_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]))
    domain = Domain(source=f"dir:{tmp_path}/a.jsonl", format="jsonl", license="CC0-1.0", sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256 is"):
        open_reader(domain, tmp_path, max_record_bytes=100)
    assert len(records_of(open_reader(domain, tmp_path, max_record_bytes=100, check=False))) == 1

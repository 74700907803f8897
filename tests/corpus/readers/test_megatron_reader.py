from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus.readers.megatron import read_index
from tasks.corpus.records import CorpusError, Document
from tests.corpus.readers.reading import read, reader_of, records_of

CODES = {"u1": 1, "<i4": 4, "<i8": 5, "<u2": 8}


def write(stem: Path, documents: list[list[list[int]]], *, dtype: str = "<u2", modes: bool = False) -> None:
    """Documents of sequences of tokens, byte by byte as Megatron's IndexedDatasetBuilder writes them."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    first_sequences = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<QQ", len(sequences), len(first_sequences))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += sequence.nbytes
    index += b"".join(struct.pack("<q", first) for first in first_sequences)
    stem.with_suffix(".idx").write_bytes(index + (bytes(len(sequences)) if modes else b""))
    stem.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [False, True])
def test_a_document_is_the_tokens_of_its_sequences_as_stored(tmp_path: Path, dtype: str, modes: bool) -> None:
    write(tmp_path / "a", [[[1, 2, 3], [4]], [], [[5]], [[], [6, 7]]], dtype=dtype, modes=modes)
    write(tmp_path / "b", [[[9]]], dtype=dtype)
    result, rejects = read(tmp_path, format="megatron")
    assert [(d.source, d.row, d.text, list(d.ids if d.ids is not None else [-1])) for d in result] == [
        ("a.bin", 0, "", [1, 2, 3, 4]),
        ("a.bin", 1, "", []),
        ("a.bin", 2, "", [5]),
        ("a.bin", 3, "", [6, 7]),
        ("b.bin", 0, "", [9]),
    ]
    assert {d.ids.dtype for d in result if d.ids is not None} == {np.dtype(dtype)}
    assert rejects == []


@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=3), max_size=12),
    task_bytes=st.integers(1, 60),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_do_not_depend_on_how_they_are_shared_out(
    tmp_path: Path, documents: list[list[list[int]]], task_bytes: int
) -> None:
    write(tmp_path / "a", documents)
    reader = reader_of(tmp_path, format="megatron")
    result = [
        (record.row, record.ids.tolist())
        for record in records_of(reader, task_bytes=task_bytes)
        if isinstance(record, Document) and record.ids is not None
    ]
    assert result == [
        (row, [token for sequence in document for token in sequence]) for row, document in enumerate(documents)
    ]
    sizes = [reader.size(piece) for task in reader.tasks(task_bytes=task_bytes) for piece in task]
    assert sum(sizes) == 2 * sum(len(ids) for _, ids in result)


def test_an_over_long_document_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1] * 50], [[1] * 26, [1] * 25], [[2]]])
    result, rejects = read(tmp_path, format="megatron", max_record_bytes=100)
    assert [document.row for document in result] == [0, 2]
    assert [(reject.rule, reject.row) for reject in rejects] == [("over-long record", 1)]


def test_an_index_is_read_from_an_archive_too(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]], [[3]]])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for ending in ("bin", "idx"):
            archive.write(tmp_path / f"a.{ending}", f"x/a.{ending}")
    result, _ = read(f"zip://x/*::file://{tmp_path}/a.zip", format="megatron")
    assert [(d.source, list(d.ids if d.ids is not None else [])) for d in result] == [
        ("x/a.bin", [1, 2]),
        ("x/a.bin", [3]),
    ]


def put(content: bytes, at: int, format: str, value: Any) -> bytes:
    return content[:at] + struct.pack(format, value) + content[at + struct.calcsize(format) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "0 bytes are no Megatron index"),
        (lambda c: b"TNTIDX\0\0\0" + c[9:], r"is no Megatron index, it starts with b'TNTIDX"),
        (lambda c: put(c, 9, "<Q", 2), "is version 2 of Megatron's index, not 1"),
        (lambda c: put(c, 17, "<B", 7), "its tokens are of type code 7"),
        (lambda c: c[:-1], r"has 81 bytes, its header says 82"),
        (lambda c: c + b"\0", r"has 83 bytes, its header says 82"),
        (lambda c: put(c, 18, "<Q", 1 << 60), "its header says"),
        (lambda c: put(c, 34, "<i", -1), "a sequence has a negative length"),
        (lambda c: put(c, 42, "<q", -2), "a sequence has a negative offset"),
        (lambda c: put(c, 58, "<q", 1), "its document index does not rise from 0 to 2"),
        (lambda c: put(c, 66, "<q", 3), "its document index does not rise from 0 to 2"),
        (lambda c: put(c, 74, "<q", 1), "its document index does not rise from 0 to 2"),
    ],
)
def test_a_damaged_index_is_named_with_what_is_wrong(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path / "a", [[[1, 2]], [[3]]])
    path = tmp_path / "a.idx"
    path.write_bytes(damage(path.read_bytes()))
    for task_bytes in (1, 1000):
        with pytest.raises(CorpusError, match=f"a.idx: .*{message}"):
            records_of(reader_of(tmp_path, format="megatron"), task_bytes=task_bytes)
    with path.open("rb") as file, pytest.raises(CorpusError, match=message):
        read_index(file)


def test_tokens_that_are_cut_short_or_lack_their_index_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]], [[3]]])
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(CorpusError, match=r"a.bin: has 4 bytes, but its index points up to byte 6"):
        read(tmp_path, format="megatron")
    with pytest.raises(CorpusError, match=r"a.bin: its .idx is missing; the source must match both files"):
        read(tmp_path / "a.bin", format="megatron")
    with pytest.raises(CorpusError, match=r"matches no .bin file"):
        read(tmp_path / "a.idx", format="megatron")

from __future__ import annotations

import errno
import hashlib
import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus import shards

OUT_OF_MEMORY = [OSError(errno.ENOMEM, "Memory mapping file failed"), pa.ArrowMemoryError("realloc"), MemoryError()]
FACTS = {"format": shards.FORMAT, "domain": "d", "split": "train", "tokenizer": "t", "task_key": "k"}
DOCUMENT = st.tuples(
    st.lists(st.integers(0, 65535), min_size=1, max_size=9),
    st.binary(min_size=16, max_size=16),
    st.sampled_from(["a", "b", "Köln/東京.jsonl", ""]),
    st.integers(0, 2**64 - 1),
)


def made(documents: list[Any], *, cuts: list[int], dtype: type = np.uint16) -> shards.Part:
    """Documents (ids, doc_id, source, row), appended in runs that end at `cuts`."""
    part = shards.Part()
    offsets = np.cumsum([0, *(len(d[0]) for d in documents)])
    flat = np.array([i for d in documents for i in d[0]], dtype=dtype)
    edges = sorted({0, len(documents), *(cut % (len(documents) + 1) for cut in cuts)})
    for start, stop in pairwise(edges):
        mine = documents[start:stop]
        part.append(
            flat,
            offsets[start : stop + 1],
            doc_ids=np.frombuffer(b"".join(d[1] for d in mine), dtype=np.uint8).reshape(-1, 16),
            sources=[d[2] for d in mine],
            rows=np.array([d[3] for d in mine], dtype=np.uint64),
            text_bytes=7 * len(mine),
        )
    return part


def reference(documents: list[Any], dtype: pa.DataType, facts: dict[str, str]) -> bytes:
    """The bytes of a shard by pyarrow's own conversions, one document after the other."""
    columns = {
        "input_ids": pa.array([d[0] for d in documents], pa.large_list(dtype)),
        "doc_id": pa.array([d[1] for d in documents], pa.binary(16)),
        "source": pa.array([d[2] for d in documents]).dictionary_encode(),
        "row": pa.array([d[3] for d in documents], pa.uint64()),
    }
    schema = pa.schema({name: column.type for name, column in columns.items()}, metadata=facts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return sink.getvalue().to_pybytes()


@settings(deadline=None, max_examples=25)
@given(
    documents=st.lists(DOCUMENT, min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 20), max_size=3),
    seed=st.integers(0, 2**32 - 1),
    wide=st.booleans(),
)
def test_a_shard_holds_the_documents_in_the_order_asked_for_and_its_sidecar_tells_of_them(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Any], cuts: list[int], seed: int, wide: bool
) -> None:
    path = tmp_path_factory.mktemp("shard") / "d/train/part-00000-000.arrow"
    dtype = np.uint32 if wide else np.uint16
    order = np.random.default_rng(seed).permutation(len(documents))
    part = made(documents, cuts=cuts, dtype=dtype)
    sidecar = shards.write(path, part, order=order, dtype=dtype, metadata=FACTS)
    shuffled = [documents[i] for i in order]
    flat = [i for d in shuffled for i in d[0]]
    facts = {**FACTS, "documents": str(len(documents)), "tokens": str(len(flat))}
    expected = reference(shuffled, pa.from_numpy_dtype(dtype), facts)
    content = path.read_bytes()
    assert content == expected
    assert sidecar == json.loads(shards.sidecar_of(path).read_text())
    assert sidecar == {
        "path": "d/train/part-00000-000.arrow",
        "size": len(content),
        "documents": len(documents),
        "tokens": len(flat),
        "text_bytes": 7 * len(documents),
        "min_id": min(flat),
        "max_id": max(flat),
        "first_ids": flat[:32],
        "first_doc_id": shuffled[0][1].hex(),
        "last_doc_id": shuffled[-1][1].hex(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "xxh3_128": xxhash.xxh3_128_hexdigest(content),
        "task_key": "k",
    }


def some(n: int, *, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 400, rng.integers(1, 60)).tolist(), rng.bytes(16), f"f{i % 3}", i) for i in range(n)]


def test_writing_holds_the_ids_once_more_and_no_copy_of_the_file(tmp_path: Path) -> None:
    rng, part = np.random.default_rng(0), shards.Part()
    for _ in range(16):
        part.append(
            rng.integers(0, 400, 500_000, dtype=np.uint16),
            np.arange(0, 500_001, 1000),
            doc_ids=rng.integers(0, 256, (500, 16), dtype=np.uint8),
            sources=["a"] * 500,
            rows=np.arange(500, dtype=np.uint64),
            text_bytes=1,
        )
    size = 16 * 500_000 * 2
    order = rng.permutation(part.documents)
    tracemalloc.start()  # numpy tells it of its arrays
    before = pa.default_memory_pool().max_memory()
    shards.write(tmp_path / "d/train/part.arrow", part, order=order, dtype=np.uint16, metadata=FACTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < peak < 1.25 * size
    assert pa.default_memory_pool().max_memory() - before < 0.1 * size


def test_ids_of_another_type_and_lengths_that_disagree_are_refused(tmp_path: Path) -> None:
    part = made(some(3), cuts=[], dtype=np.uint32)
    with pytest.raises(TypeError, match="ids are uint32, not uint16"):
        shards.write(tmp_path / "a.arrow", part, order=np.arange(3), dtype=np.uint16, metadata=FACTS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="2 documents, 1 doc_ids, 2 sources and 2 rows"):
        part.append(
            np.zeros(4, dtype=np.uint16),
            np.array([0, 2, 4]),
            doc_ids=np.zeros((1, 16), dtype=np.uint8),
            sources=["a", "a"],
            rows=np.zeros(2, dtype=np.uint64),
            text_bytes=0,
        )


def test_a_shard_counts_as_finished_only_with_its_own_sidecar_and_size(tmp_path: Path) -> None:
    path = tmp_path / "d/train/part.arrow"
    sidecar = shards.write(path, made(some(5), cuts=[]), order=np.arange(5), dtype=np.uint16, metadata=FACTS)
    assert shards.committed(path, "k") == sidecar
    assert shards.committed(path, "other") is None
    path.write_bytes(path.read_bytes()[:-8])
    assert shards.committed(path, "k") is None
    path.unlink()
    assert shards.committed(path, "k") is None
    shards.sidecar_of(path).write_text("{")
    path.touch()
    assert shards.committed(path, "k") is None


def test_readers_refuse_a_stream_without_exactly_one_batch_and_what_is_no_stream(tmp_path: Path) -> None:
    batch = made(some(4), cuts=[]).batch(np.arange(4), dtype=np.uint16, metadata=FACTS)
    for count in (0, 2):
        with (tmp_path / f"{count}.arrow").open("wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
            for _ in range(count):
                writer.write_batch(batch)
        with pytest.raises(ValueError, match=rf"{count}.arrow: holds {count} record batches, a shard has 1"):
            shards.open_shard(tmp_path / f"{count}.arrow")
    (tmp_path / "text.arrow").write_text("not arrow")
    with pytest.raises(ValueError, match=r"text.arrow: not a readable shard"):
        shards.open_shard(tmp_path / "text.arrow")


def test_views_of_a_shard_are_views_of_its_map(tmp_path: Path) -> None:
    documents, path = some(20), tmp_path / "d/train/part.arrow"
    shards.write(path, made(documents, cuts=[3]), order=np.arange(20), dtype=np.uint16, metadata=FACTS)
    before = pa.total_allocated_bytes()
    batch = shards.open_shard(path)
    ids, offsets, doc_ids = shards.flat_ids(batch), shards.offsets(batch), shards.doc_ids(batch)
    assert pa.total_allocated_bytes() == before
    assert not any(array.flags.owndata for array in (ids, offsets, doc_ids))
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [d[0] for d in documents]
    assert [identity.tobytes() for identity in doc_ids] == [d[1] for d in documents]
    part = batch.slice(5, 6)
    assert [identity.tobytes() for identity in shards.doc_ids(part)] == [d[1] for d in documents[5:11]]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_while_a_shard_is_mapped_does_not_call_it_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pa, "memory_map", full)
    with pytest.raises(
        OSError, match="nothing is known to be wrong with it: free memory, or raise the limit"
    ) as caught:
        shards.open_shard(tmp_path / "part-00000-000.arrow")
    assert caught.value.errno == errno.ENOMEM
    assert "make the corpus again" not in str(caught.value)

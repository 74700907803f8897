"""Checks of shards: the file, the sidecar, the contents, and documents that stand in two shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from tasks.corpus import manifest, shards

SORTED_AT_ONCE = 1 << 24  # document ids looked at together: about 0.7 GB
BLOCK = 1 << 20


def sidecar_faults(path: Path, shard: manifest.Shard) -> Iterator[str]:
    """What is wrong with a sidecar: it is, byte for byte, what the manifest says of its shard."""
    if text := missing(path):
        yield text
        return
    content, expected = path.read_bytes(), shards.sidecar_bytes(dataclasses.asdict(shard))
    if content == expected:
        return
    try:
        written, listed = json.loads(content), json.loads(expected)
        differ = [key for key in listed if written.get(key) != listed[key]]
    except (ValueError, AttributeError) as error:
        yield f"damaged: {error}"
    else:
        yield f"differs from the manifest in {', '.join(differ) or 'its layout, or has more fields'}"


def file_faults(path: Path, shard: manifest.Shard) -> list[str]:
    """What is wrong with the size or the digests of a shard's file."""
    if text := missing(path):
        return [text]
    if (size := path.stat().st_size) != shard.size:
        return [f"{size} bytes, the manifest says {shard.size}; it was cut short or replaced"]
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            xxh3.update(block)
    digests = {"sha256": sha256.hexdigest(), "xxh3_128": xxh3.hexdigest()}
    return [
        f"{name} is {digest}, the manifest says {getattr(shard, name)}"
        for name, digest in digests.items()
        if digest != getattr(shard, name)
    ]


def content_faults(
    path: Path, shard: manifest.Shard, corpus: manifest.Manifest, *, place: tuple[str, str]
) -> Iterator[str]:
    """What is wrong with the contents of a shard whose digests are right.

    `place` is the domain and the split that the shard is of.
    """
    try:
        batch = shards.open_shard(path)
        shards.require_shard(batch, path)
        batch.validate(full=True)
    except (ValueError, pa.ArrowInvalid) as error:
        yield str(error).removeprefix(f"{path}: ")
        return
    ids, offsets, doc_ids = shards.flat_ids(batch), shards.offsets(batch), shards.doc_ids(batch)
    if (offsets[0], offsets[-1]) != (0, len(ids)) or (np.diff(offsets) == 0).any():
        yield "documents don't cover its ids, or one has none"
        return
    actual = {
        "documents": batch.num_rows,
        "tokens": len(ids),
        "min_id": int(ids.min()),
        "max_id": int(ids.max()),
        "first_ids": tuple(ids[: shards.FIRST_IDS].tolist()),
        "first_doc_id": doc_ids[0].tobytes().hex(),
        "last_doc_id": doc_ids[-1].tobytes().hex(),
    }
    for name, value in actual.items():
        if value != getattr(shard, name):
            yield f"{name} is {value}, the manifest says {getattr(shard, name)}"
    if str(ids.dtype) != corpus.dtype:
        yield f"ids are {ids.dtype}, the manifest says {corpus.dtype}"
    if actual["max_id"] >= corpus.vocab_size:
        yield f"id {actual['max_id']} is outside the vocabulary of {corpus.vocab_size}"
    if "eos" in corpus.separators:
        yield from _separator_faults(ids[offsets[1:] - 1], corpus.eos_token_id, where="end with EOS")
    if "bos" in corpus.separators:
        yield from _separator_faults(ids[offsets[:-1]], corpus.bos_token_id, where="begin with BOS")
    metadata = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    expected = {"tokenizer": corpus.tokenizer, "domain": place[0], "split": place[1], "task_key": shard.task_key}
    for name, text in expected.items():
        if metadata[name] != text:
            yield f"{name} in its schema is {metadata[name]}, the manifest says {text}"


def _separator_faults(ids: NDArray[Any], token: int | None, *, where: str) -> Iterator[str]:
    wrong = np.flatnonzero(ids != token)
    if len(wrong):
        yield f"{len(wrong)} documents don't {where} ({token}), the first at row {wrong[0]}"


def repeats(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Documents that stand twice: each shard that holds one for the second time, and the message.

    Sorts SORTED_AT_ONCE ids at a time, so that memory doesn't grow with the corpus.
    """
    sizes = [shards.open_shard(path).num_rows for path in paths]
    begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    passes = -(-int(begins[-1]) // SORTED_AT_ONCE)
    for share in range(passes):
        keys, places = [], []
        for begin, path in zip(begins, paths, strict=False):
            words = shards.doc_ids(shards.open_shard(path)).view("<u8")
            mine = np.flatnonzero(words[:, 0] % np.uint64(passes) == share)
            keys.append(words[mine])
            places.append(begin + mine)
        words, place = np.concatenate(keys), np.concatenate(places)
        order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ids stay in the order of their places
        words, place = words[order], place[order]
        again = np.flatnonzero((words[1:] == words[:-1]).all(axis=1)) + 1
        later, earlier = (np.searchsorted(begins, place[i], side="right") - 1 for i in (again, again - 1))
        for home in np.unique(later):
            mine = np.flatnonzero(later == home)
            first = mine[np.argmin(place[again[mine]])]
            row, other = place[again[first]] - begins[home], paths[earlier[first]]
            text = f"{len(mine)} documents stand in the corpus before, the first at row {row} in {other}"
            yield paths[home], text


def missing(path: Path) -> str:
    """How a file is missing; empty if it is there."""
    if path.exists():
        return ""
    return f"missing (a link to {path.readlink()}, where nothing is)" if path.is_symlink() else "missing"

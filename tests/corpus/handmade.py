"""Corpora written straight from token ids: every document, its shard and its place are the test's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.corpus import manifest, shards

EOS = 0
Split = Sequence[Sequence[Sequence[int]]]  # shards of documents of token ids


def documents(lengths: Sequence[int], *, seed: int = 0) -> list[np.ndarray]:
    """Documents of random ids of which the last is EOS."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, 1 << 16, n - 1), EOS) for n in lengths]


def corpus(folder: Path, domains: Mapping[str, Split], *, validation: Mapping[str, Split] | None = None) -> Path:
    """A corpus whose training (and validation) splits hold these shards, in order; the last is also the test split."""
    entries = {}
    for name, train in sorted(domains.items()):
        splits = {"train": train, "validation": (validation or {}).get(name, train[:1]), "test": train[-1:]}
        written = {split: manifest.split_of(_shards(folder / name / split, some)) for split, some in splits.items()}
        entries[name] = {**written, "rules": {}, "license": "CC0-1.0", "source": "dir:none", "files": {}}
    facts = {
        "format": manifest.FORMAT,
        "corpus": folder.name,
        "model": "none",
        "tokenizer": "none",
        "vocab_size": 1 << 16,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "separators": "eos",
        "dtype": "uint16",
        "seed": 0,
        "domains": entries,
    }
    (folder / manifest.FILE).write_text(json.dumps(facts))
    return folder


def _shards(folder: Path, parts: Split) -> list[dict[str, Any]]:
    return [_shard(folder / f"part-{i:05d}-000.arrow", documents) for i, documents in enumerate(parts)]


def _shard(path: Path, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
    part, n = shards.Part(), len(documents)
    part.append(
        np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in documents]),
        np.cumsum([0, *map(len, documents)]),
        doc_ids=np.arange(n * 16, dtype=np.int64).astype(np.uint8).reshape(n, 16),
        sources=["made"] * n,
        rows=np.arange(n, dtype=np.uint64),
        text_bytes=0,
    )
    metadata = dict.fromkeys(shards.METADATA, "made")
    return shards.write(path, part, order=np.arange(n), dtype=np.uint16, metadata=metadata)

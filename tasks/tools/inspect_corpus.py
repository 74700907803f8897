"""Describe shards and corpora, for `moeforge inspect`: counts, provenance, first tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tasks.corpus import manifest, shards
from tasks.corpus.tokenizer import encoder

MODELS = Path("data/models")
SHOWN = 64  # tokens decoded
FIELDS = (
    *("corpus", "sha256", "model", "tokenizer", "vocab_size", "separators", "eos_token_id", "bos_token_id"),
    *("dtype", "seed"),
)


def describe_shard(path: Path, *, model_dir: Path | None = None) -> dict[str, Any]:
    """What a shard holds: counts, provenance, the first document's tokens and, with its model at hand, their text.

    `model_dir` defaults to the model that the corpus around the shard names. Raises ValueError if it isn't a shard.
    """
    batch = shards.open_shard(path)
    shards.require_shard(batch, path)
    metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
    ids, offsets = shards.flat_ids(batch), shards.offsets(batch)
    first = ids[: min(SHOWN, int(offsets[1]))]
    lengths = np.diff(offsets)
    return {
        "path": str(path),
        "size": path.stat().st_size,
        "documents": batch.num_rows,
        "tokens": len(ids),
        "tokens_per_document": {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())},
        "dtype": str(ids.dtype),
        "ids": {"min": int(ids.min()), "max": int(ids.max())},
        "sources": len(batch.column("source").unique()),
        "first_document": {
            "doc_id": shards.doc_ids(batch)[0].tobytes().hex(),
            "source": batch.column("source")[0].as_py(),
            "row": batch.column("row")[0].as_py(),
            "ids": first.tolist(),
            "text": _decode(first.tolist(), model_dir or _model_of(path.parent.parent.parent), metadata["tokenizer"]),
        },
        **{key: metadata[key] for key in shards.METADATA},
    }


def describe_manifest(corpus_dir: Path, *, model_dir: Path | None = None) -> dict[str, Any]:
    """What a corpus holds: counts, rules, licence and source per domain, and the text of its first tokens."""
    corpus = manifest.load(corpus_dir)
    model_dir = model_dir or _model_of(corpus_dir)
    domains = {}
    for name, domain in corpus.domains.items():
        first = list((domain.test if domain.unseen else domain.train).shards[0].first_ids)
        domains[name] = {
            **{
                split: {"shards": len(part.shards), "documents": part.documents, "tokens": part.tokens}
                for split, part in domain.splits.items()
            },
            "bytes_per_token": domain.bytes_per_token,
            "rules": domain.rules,
            "license": domain.license,
            "source": domain.source,
            "unseen": domain.unseen,
            "first_ids": first,
            "first_text": _decode(first, model_dir, corpus.tokenizer),
        }
    return {"path": str(corpus_dir), **{name: getattr(corpus, name) for name in FIELDS}, "domains": domains}


def _model_of(corpus_dir: Path) -> Path | None:
    path = corpus_dir / manifest.FILE
    return MODELS / manifest.load(corpus_dir).model if path.exists() else None


def _decode(ids: list[int], model_dir: Path | None, tokenizer: str) -> str | None:
    """Text of ids; None without the model whose tokenizer made them."""
    if model_dir is None or not (model_dir / "tokenizer.json").exists():
        return None
    opened = encoder.load_encoder(model_dir)
    is_same = opened.fingerprint.split("/")[0] == tokenizer.split("/")[0]  # separators don't matter here
    return opened.decode(ids) if is_same else None

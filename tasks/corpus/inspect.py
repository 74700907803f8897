"""Look into shards and corpora, and check that they are whole.

python -m tasks.corpus.inspect data/corpora/NAME                         # counts, provenance, first tokens
python -m tasks.corpus.inspect data/corpora/NAME/DOMAIN/train/part-00000.arrow
python -m tasks.corpus.inspect --verify data/corpora/NAME                # hashes, ids, EOS, foreign files
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks import scratch
from tasks.corpus import encoder, manifest, shards

MODELS = Path("data/models")
SHOWN = 64  # tokens decoded
SHOWN_METADATA = ("domain", "split", "tokenizer", "eos_token_id", "task_key")


def describe_shard(path: Path, *, model_dir: Path | None = None) -> dict[str, Any]:
    """What a shard holds: counts, provenance, the first document's tokens and, with its model at hand, their text.

    `model_dir` defaults to the model that the corpus around the shard names. Raises ValueError if it isn't a shard.
    """
    batch = shards.open_shard(path)
    _require_shard(batch, path)
    metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
    ids, ends = shards.flat_ids(batch), _ends(batch)
    first = ids[: min(SHOWN, int(ends[0]))]
    lengths = np.diff(ends, prepend=0)
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
            "doc_id": batch.column("doc_id")[0].as_py().hex(),
            "source": batch.column("source")[0].as_py(),
            "row": batch.column("row")[0].as_py(),
            "ids": first.tolist(),
            "text": _decode(first.tolist(), model_dir or _model_of(path.parent.parent.parent), metadata["tokenizer"]),
        },
        **{key: metadata[key] for key in SHOWN_METADATA},
    }


def describe_manifest(corpus_dir: Path, *, model_dir: Path | None = None) -> dict[str, Any]:
    """What a corpus holds: counts, rules, licence and source per domain, and the text of its first tokens."""
    found = manifest.load(corpus_dir)
    model_dir = model_dir or _model_of(corpus_dir)
    domains = {}
    for name, domain in found.domains.items():
        first = list(domain.train.shards[0].first_ids)
        domains[name] = {
            **{
                split: {"shards": len(part.shards), "documents": part.documents, "tokens": part.tokens}
                for split, part in (("train", domain.train), ("heldout", domain.heldout))
            },
            "bytes_per_token": round(
                (domain.train.bytes + domain.heldout.bytes) / (domain.train.tokens + domain.heldout.tokens), 4
            ),
            "rules": domain.rules,
            "license": domain.license,
            "source": domain.source,
            "first_ids": first,
            "first_text": _decode(first, model_dir, found.tokenizer),
        }
    return {
        "path": str(corpus_dir),
        "corpus": found.corpus,
        "sha256": found.sha256,
        "model": found.model,
        "tokenizer": found.tokenizer,
        "vocab_size": found.vocab_size,
        "eos_token_id": found.eos_token_id,
        "dtype": found.dtype,
        "seed": found.seed,
        "domains": domains,
    }


def verify_corpus(corpus_dir: Path) -> list[str]:
    """Everything that is wrong with a corpus, each line naming its file; empty if nothing is.

    Reads every byte: hashes and sizes against the sidecars and the manifest, ids against the vocabulary, EOS at the
    end of each document and document ids that stand twice; also files that belong to no shard.
    """
    try:
        found = manifest.load(corpus_dir)
    except (ValueError, KeyError, TypeError) as error:
        return [f"{corpus_dir / manifest.FILE}: {error}"]
    problems = []
    expected = {corpus_dir / manifest.FILE}
    seen: dict[bytes, Path] = {}
    for domain in found.domains.values():
        for part in (domain.train, domain.heldout):
            for shard in part.shards:
                path = corpus_dir / shard.path
                expected |= {path, shards.sidecar_of(path)}
                problems += [f"{path}: {text}" for text in _shard_problems(path, shard, found, seen=seen)]
            totals = (sum(s.documents for s in part.shards), sum(s.tokens for s in part.shards))
            if totals != (part.documents, part.tokens):
                problems.append(
                    f"{corpus_dir / manifest.FILE}: shards hold {totals} documents and tokens, "
                    f"not {(part.documents, part.tokens)}"
                )
    foreign = sorted(path for path in corpus_dir.rglob("*") if path.is_file() and path not in expected)
    return problems + [f"{path}: foreign file, the manifest doesn't list it" for path in foreign]


def _shard_problems(
    path: Path, shard: manifest.Shard, found: manifest.Manifest, *, seen: dict[bytes, Path]
) -> Iterator[str]:
    if not path.exists():
        yield "missing"
        return
    yield from _sidecar_problems(path, shard)
    if (size := path.stat().st_size) != shard.size:
        yield f"{size} bytes, the manifest says {shard.size}; it was cut short or replaced"
        return
    if (digest := scratch.digest(path)) != shard.sha256:
        yield f"sha256 is {digest}, the manifest says {shard.sha256}"
    try:
        batch = shards.open_shard(path)
        _require_shard(batch, path)
    except ValueError as error:
        yield str(error).removeprefix(f"{path}: ")
        return
    ids, ends = shards.flat_ids(batch), _ends(batch)
    if (batch.num_rows, len(ids)) != (shard.documents, shard.tokens):
        yield f"{batch.num_rows} documents and {len(ids)} tokens, not {shard.documents} and {shard.tokens}"
    if len(ids) and ids.max() >= found.vocab_size:
        yield f"id {ids.max()} is outside the vocabulary of {found.vocab_size}"
    unended = np.flatnonzero((np.diff(ends, prepend=0) == 0) | (ids[np.maximum(ends, 1) - 1] != found.eos_token_id))
    if len(unended):
        yield f"{len(unended)} documents don't end with EOS ({found.eos_token_id}), the first at row {unended[0]}"
    tokenizer = (batch.schema.metadata or {}).get(b"tokenizer", b"").decode()
    if tokenizer != found.tokenizer:
        yield f"tokenised with {tokenizer or 'an unnamed tokenizer'}, the manifest says {found.tokenizer}"
    for row, identity in enumerate(batch.column("doc_id").to_pylist()):
        if identity in seen:
            yield f"row {row} is a document that {seen[identity]} holds already"
            return
        seen[identity] = path


def _sidecar_problems(path: Path, shard: manifest.Shard) -> Iterator[str]:
    sidecar = shards.sidecar_of(path)
    if not sidecar.exists():
        yield f"its sidecar {sidecar.name} is missing"
        return
    try:
        written = json.loads(sidecar.read_text())
    except ValueError as error:
        yield f"its sidecar {sidecar.name} is not JSON: {error}"
        return
    listed = {**vars(shard), "first_ids": list(shard.first_ids)}
    if differ := [key for key in listed if written.get(key) != listed[key]]:
        yield f"its sidecar {sidecar.name} differs from the manifest in {', '.join(differ)}"


def _ends(batch: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each document ends in the flat ids, int64 [documents]."""
    return batch.column("input_ids").offsets.to_numpy()[1:]


def _require_shard(batch: Any, path: Path) -> None:
    if missing := {"input_ids", "doc_id", "source", "row"} - set(batch.schema.names):
        raise ValueError(f"{path}: no shard, it lacks the columns {', '.join(sorted(missing))}")
    if missing := set(SHOWN_METADATA) - {key.decode() for key in batch.schema.metadata or {}}:
        raise ValueError(f"{path}: no shard, its schema lacks the metadata {', '.join(sorted(missing))}")
    if batch.num_rows == 0:
        raise ValueError(f"{path}: holds no document")


def _model_of(corpus_dir: Path) -> Path | None:
    path = corpus_dir / manifest.FILE
    return MODELS / manifest.load(corpus_dir).model if path.exists() else None


def _decode(ids: list[int], model_dir: Path | None, tokenizer: str) -> str | None:
    """Text of ids; None without the model whose tokenizer made them."""
    if model_dir is None or not (model_dir / "tokenizer.json").exists():
        return None
    opened = encoder.load_encoder(model_dir)
    return opened.decode(ids) if encoder.same_ids(opened.fingerprint, tokenizer) else None


def main() -> int:
    """Print a description as JSON, or the problems found; exit 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tasks.corpus.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a corpus directory or an .arrow shard")
    parser.add_argument("--verify", action="store_true", help="check a corpus byte by byte")
    arguments = parser.parse_args()
    if arguments.verify:
        problems = verify_corpus(arguments.path)
        print("\n".join(problems) or f"{arguments.path}: whole")
        return bool(problems)
    try:
        describe = describe_manifest if arguments.path.is_dir() else describe_shard
        print(json.dumps(describe(arguments.path), indent=2, ensure_ascii=False))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

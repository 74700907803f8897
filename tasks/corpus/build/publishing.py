"""What is published of a corpus: shards and their manifest, metrics, and the lengths of its documents."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tasks import scratch
from tasks.corpus import files, fingerprint, manifest, shards
from tasks.corpus.build import tokenise
from tasks.corpus.build.planning import SOURCES, Plan
from tasks.corpus.dedup import decontamination
from tasks.corpus.tokenizer.encoder import Encoder


def lengths_file(name: str) -> Path:
    """Document lengths of corpus `name`: domain, tokens_from, documents, tokens; a row for [n, 2n) tokens."""
    return fingerprint.CORPORA / f"{name}.lengths.csv"


def publish(todo: Plan, *, out: Path, resolved: dict[str, Any], encode: Encoder) -> dict[str, Any]:
    """Write the manifest, move the corpus into place, write lengths and metrics; returns the metrics."""
    records = {domain: _records(out, todo, domain) for domain in todo.tasks}
    corpus = out / "corpus"
    scratch.write_json(corpus / manifest.FILE, _manifest(todo, records, resolved=resolved, encode=encode))
    made = manifest.load(corpus)
    metrics = _metrics(made, records, resolved=resolved) | _decontamination(todo)
    lengths = _lengths(corpus, made).encode()
    scratch.publish(corpus, fingerprint.CORPORA / todo.name)
    with files.replacing(lengths_file(todo.name)) as file:
        file.write(lengths)
    scratch.write_json(fingerprint.CORPORA / f"{todo.name}.json", metrics)  # last: figures of what is there
    return metrics


def _records(out: Path, todo: Plan, domain: str) -> list[dict[str, Any]]:
    found = [tokenise.finished(out, domain, task=task) for task in range(len(todo.tasks[domain]))]
    assert all(found), f"{domain}: not every task is tokenised"
    return [record for record in found if record is not None]


def _manifest(
    todo: Plan, records: dict[str, list[dict[str, Any]]], *, resolved: dict[str, Any], encode: Encoder
) -> dict[str, Any]:
    """The manifest as JSON: a function of the inputs alone, so no times and no machine in it."""
    corpus = todo.corpus
    return {
        "format": manifest.FORMAT,
        "corpus": todo.name,
        "model": corpus.model,
        "tokenizer": encode.fingerprint,
        "vocab_size": encode.vocab_size,
        "eos_token_id": encode.eos_token_id,
        "bos_token_id": encode.bos_token_id,
        "separators": corpus.separators,
        "dtype": encode.dtype.__name__,
        "seed": corpus.seed,
        "domains": {
            domain: {
                **{
                    split: manifest.split_of([sidecar for record in found for sidecar in record["splits"][split]])
                    for split in manifest.SPLITS
                },
                "rules": resolved[domain]["rules"],
                "license": corpus.domains[domain].license,
                "source": corpus.domains[domain].source,
                "files": {path: digest for record in found for path, digest in record["files"].items()},
            }
            for domain, found in records.items()
        },
    }


def _metrics(
    made: manifest.Manifest, records: dict[str, list[dict[str, Any]]], *, resolved: dict[str, Any]
) -> dict[str, Any]:
    """What `dvc metrics show` shows. Rates are per process, and cover what each task's last run encoded itself."""
    domains = {}
    for name, entry in made.domains.items():
        domains[name] = {
            "documents": {split: part.documents for split, part in entry.splits.items()},
            "tokens": {split: part.tokens for split, part in entry.splits.items()},
            "rules": entry.rules,
            "bad": resolved[name]["bad"],
            "bytes_per_token": entry.bytes_per_token,
            "seconds": round(_total(records[name], "seconds"), 2),
            "tokens_per_second": _rate(records[name]),
            "license": entry.license,
            "source": entry.source,
        }
    every = [record for found in records.values() for record in found]
    parts = [part for entry in made.domains.values() for part in entry.splits.values()]
    checks: Counter[str] = Counter()
    for record in every:
        checks["probed"] = max(checks["probed"], record["checks"]["probed"])
        checks["sampled"] += record["checks"]["sampled"]
    return {
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "tokens_per_second": _rate(every),
        "tokenizer": made.tokenizer,
        "encoder": {"backend": ", ".join(sorted({record["backend"] for record in every})), **checks},
        "sha256": made.sha256,
        "domains": domains,
    }


def _decontamination(todo: Plan) -> dict[str, Any]:
    """How many n-grams of the evaluation items were looked for, and how many of their texts were too short."""
    if todo.corpus.decontaminate is None:
        return {}
    items = decontamination.Items.load(todo.corpus.decontaminate, SOURCES)
    return {"decontamination": {"ngrams": items.ngrams, "short": items.short}}


def _lengths(corpus: Path, made: manifest.Manifest) -> str:
    """The CSV of lengths_file: buckets of powers of two, per domain, all splits together."""
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["domain", "tokens_from", "documents", "tokens"])
    for name, entry in made.domains.items():
        documents, tokens = np.zeros(64, dtype=np.int64), np.zeros(64, dtype=np.int64)
        for shard in (shard for part in entry.splits.values() for shard in part.shards):
            sizes = np.diff(shards.open_shard(corpus / shard.path).column("input_ids").offsets.to_numpy())
            bucket = np.frexp(np.maximum(sizes, 1))[1] - 1
            documents += np.bincount(bucket, minlength=64)
            tokens += np.bincount(bucket, weights=sizes, minlength=64).astype(np.int64)
        for bucket in np.flatnonzero(documents):
            table.writerow([name, 1 << int(bucket), documents[bucket], tokens[bucket]])
    return written.getvalue()


def _total(records: list[dict[str, Any]], field: str) -> float:
    return sum(record[field] for record in records)


def _rate(records: list[dict[str, Any]]) -> int:
    return round(_total(records, "encoded_tokens") / max(_total(records, "seconds"), 1e-9))

"""Publish a corpus: its shards with their manifest, its metrics, and the lengths of its documents."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from tasks import scratch
from tasks.corpus import files, fingerprint, manifest, shards
from tasks.corpus.dedup import decontamination
from tasks.corpus.prepare import tokenise
from tasks.corpus.prepare.planning import SOURCES, Plan
from tasks.corpus.tokenizer.encoder import Encoder


def lengths_file(name: str) -> Path:
    """Document lengths of corpus `name`: domain, tokens_from, documents, tokens; a row for [n, 2n) tokens."""
    return fingerprint.CORPORA / f"{name}.lengths.csv"


def publish(plan: Plan, *, out: Path, counts: dict[str, Any], encode: Encoder) -> dict[str, Any]:
    """Write the manifest, move the corpus into place, write lengths and metrics; returns the metrics."""
    records = {
        domain: [json.loads(tokenise.done_path(out, domain, task=task).read_text()) for task in range(len(tasks))]
        for domain, tasks in plan.tasks.items()
    }
    corpus = out / "corpus"
    scratch.write_json(corpus / manifest.FILE, _manifest(plan, records, counts=counts, encode=encode))
    made = manifest.load(corpus)
    metrics = _metrics(made, records, counts=counts) | _decontamination(plan)
    lengths = _lengths(corpus, made).encode()
    scratch.publish(corpus, fingerprint.CORPORA / plan.name)
    with files.replacing(lengths_file(plan.name)) as file:
        file.write(lengths)
    scratch.write_json(fingerprint.CORPORA / f"{plan.name}.json", metrics)  # last: figures of what is there
    return metrics


def _manifest(
    plan: Plan, records: dict[str, list[dict[str, Any]]], *, counts: dict[str, Any], encode: Encoder
) -> dict[str, Any]:
    """The manifest as JSON: a function of the inputs alone, so no times and no machine in it."""
    corpus = plan.corpus
    return {
        "format": manifest.FORMAT,
        "corpus": plan.name,
        "model": corpus.model,
        "tokenizer": encode.fingerprint,
        **{name: getattr(encode, name) for name in ("vocab_size", "eos_token_id", "bos_token_id")},
        "separators": corpus.separators,
        "dtype": encode.dtype.__name__,
        "seed": corpus.seed,
        "domains": {
            domain: {
                **{
                    split: manifest.split_of([sidecar for record in tasks for sidecar in record["splits"][split]])
                    for split in manifest.SPLITS
                },
                "rules": counts[domain]["rules"],
                "license": corpus.domains[domain].license,
                "source": corpus.domains[domain].source,
                "files": {path: digest for record in tasks for path, digest in record["files"].items()},
                **({"unseen": True} if corpus.domains[domain].unseen else {}),
            }
            for domain, tasks in records.items()
        },
    }


def _metrics(
    made: manifest.Manifest, records: dict[str, list[dict[str, Any]]], *, counts: dict[str, Any]
) -> dict[str, Any]:
    """The metrics that DVC keeps. Rates are per process, over what the last run of each task encoded itself."""
    domains = {
        name: {
            "documents": {split: part.documents for split, part in entry.splits.items()},
            "tokens": {split: part.tokens for split, part in entry.splits.items()},
            "rules": entry.rules,
            "bad": counts[name]["bad"],
            "bytes_per_token": entry.bytes_per_token,
            "seconds": round(_total(records[name], "seconds"), 2),
            "tokens_per_second": _rate(records[name]),
            "license": entry.license,
            "source": entry.source,
            **({"unseen": True} if entry.unseen else {}),
        }
        for name, entry in made.domains.items()
    }
    every = [record for tasks in records.values() for record in tasks]
    parts = [part for entry in made.domains.values() for part in entry.splits.values()]
    checks = [record["checks"] for record in every]
    return {
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "tokens_per_second": _rate(every),
        "tokenizer": made.tokenizer,
        "encoder": {
            "backend": ", ".join(sorted({record["backend"] for record in every})),
            "probed": max(check["probed"] for check in checks),
            "sampled": sum(check["sampled"] for check in checks),
        },
        "sha256": made.sha256,
        "domains": domains,
    }


def _decontamination(plan: Plan) -> dict[str, Any]:
    """How many n-grams of the evaluation items were searched for, and how many of their texts were too short."""
    if plan.corpus.decontaminate is None:
        return {}
    items = decontamination.Items.load(plan.corpus.decontaminate, SOURCES)
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
    values: list[float] = [record[field] for record in records]
    return sum(values)


def _rate(records: list[dict[str, Any]]) -> int:
    return round(_total(records, "encoded_tokens") / max(_total(records, "seconds"), 1e-9))

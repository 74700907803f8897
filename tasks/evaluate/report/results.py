"""Reads the files of a finished pipeline that its report needs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import settings

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The metrics files as they are; curves as {series: [(tokens, value)]}."""

    name: str
    pipeline: settings.Pipeline
    model: settings.Model
    corpus: settings.Corpus
    corpus_metrics: dict[str, Any]
    mixture: dict[str, Any]
    partition: dict[str, Any]
    pretrain: dict[str, Any]
    control: dict[str, Any]
    evaluation: dict[str, Any]
    routing: dict[str, Any]
    details: dict[str, Any]
    config: dict[str, Any]
    """config.json of the trained checkpoint."""
    licence_file: str | None
    """Name of the parent's licence in the trained checkpoint, if it came with one."""
    samples: dict[str, Any]
    mixture_seconds: float
    loss: Points
    rate: Points
    """Learning rate, of the parts of the model that have none of their own."""
    gradient: Points
    """Norm of the gradient before it is clipped."""
    validation: dict[str, Points]
    weights: dict[str, Points]
    """Domain weights during training; empty if they never changed."""
    references: dict[str, float]
    """Losses of the dense parent on the windows of `validation`; empty if it was not evaluated on them."""
    events: list[dict[str, Any]]
    """Events that training reported: step, what, message."""
    lengths: dict[str, dict[int, int]]
    """{domain: {k: documents of 2^k to 2^(k+1) - 1 tokens}}."""

    def weight(self, domain: str) -> str:
        """A domain's weight at the start and at the end of training; that an unseen one has none."""
        if domain in self.corpus.unseen:
            return "unseen"
        return f"{self.mixture['weights'][domain]:.3f} → {self.pretrain['final_weights'][domain]:.3f}"


def read(name: str) -> Results:
    """Read pipeline `name`. Raises FileNotFoundError naming the first file that is missing and what writes it."""
    config = settings.load()
    pipeline = config.pipeline(name)
    run = Path("runs") / name

    def load(path: Path, stage: str, parse: Callable[[str], Any] = json.loads) -> Any:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the {stage} stage writes it: `moeforge run {name}`")
        return parse(path.read_text())

    corpora = Path("data/corpora")
    validation = load(run / "validation.csv", "pretrain", _rows)
    steps = load(run / "loss.csv", "pretrain", _rows)
    pretrain = load(run / "pretrain.json", "pretrain")
    log = load(run / "training" / "log.jsonl", "pretrain", lambda text: [json.loads(x) for x in text.splitlines()])
    return Results(
        name=name,
        pipeline=pipeline,
        model=config.model(pipeline.model),
        corpus=config.corpus(pipeline.corpus),
        corpus_metrics=load(corpora / f"{pipeline.corpus}.json", "corpus"),
        mixture=load(run / "mixture.json", "mixture"),
        partition=load(run / "partition.json", "partition"),
        pretrain=pretrain,
        control=load(run / "control.json", "control"),
        evaluation=load(run / "evaluation.json", "evaluate"),
        routing=load(run / "routing.json", "evaluate"),
        details=load(run / "details.json", "evaluate"),
        config=load(run / "trained" / "config.json", "pretrain"),
        licence_file=next((path.name for path in sorted((run / "trained").glob("LICEN[CS]E*"))), None),
        samples=load(run / "samples.json", "evaluate"),
        mixture_seconds=load(run / "mixture.time.json", "mixture")["seconds"],
        loss=_curve(steps, "loss"),
        rate=_curve(steps, "lr"),
        gradient=_curve(steps, "grad_norm"),
        validation={column: _curve(validation, column) for column in validation[0] if column not in {"step", "tokens"}}
        if validation
        else {},
        weights=_weights(log),
        references=pretrain.get("references") or {},
        events=[record for record in log if record["kind"] == "event"],
        lengths=load(corpora / f"{pipeline.corpus}.lengths.csv", "corpus", _lengths),
    )


def _rows(text: str) -> list[dict[str, float]]:
    return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(text.splitlines())]


def _lengths(text: str) -> dict[str, dict[int, int]]:
    buckets: dict[str, dict[int, int]] = {}
    for row in csv.DictReader(text.splitlines()):
        buckets.setdefault(row["domain"], {})[int(row["tokens_from"]).bit_length() - 1] = int(row["documents"])
    return buckets


def _curve(rows: list[dict[str, float]], column: str) -> Points:
    return [(row["tokens"], row[column]) for row in rows]


def _weights(log: list[dict[str, Any]]) -> dict[str, Points]:
    curves: dict[str, Points] = {}
    for record in log:
        for domain, weight in (record.get("weights") or {}).items():
            curves.setdefault(domain, []).append((record["tokens"], weight))
    moved = any(weight != points[0][1] for points in curves.values() for _, weight in points)
    return curves if moved else {}

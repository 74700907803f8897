"""Decides whether a new model is worse than the last accepted one, beyond the noise of the evaluation windows.

The rule, in bits per byte averaged over the domains that both were evaluated on:

    refused if   difference + slipped > tolerance + 2 x stderr

`difference` is the new model's figure less the accepted one's. In a domain where both saw at least half of their
windows in common, it is that on those windows, and paired; elsewhere each model counts by how far it is from its dense
parent on its own windows, if they have the same parent, and the errors add up. `slipped` is by how much the accepted
model is worse than the best one before it: noise is allowed for once, not every time.

runs/PIPELINE/accepted.json is the record of the accepted model, and all that the rule needs of it; it is in git.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks import scratch, settings
from tasks.evaluate import summary

ERRORS = 2.0
"""How many standard errors worse a model may look. Of equally good ones, 1 in 44 looks worse than that by chance."""

Record = dict[str, Any]
"""trained, dense: bits per byte averaged over domains; parent: digest of the dense parent; slipped; date; code: the
commit that trained it; dvc_lock_sha256; release: id of its folder; domains: {domain: {windows: their digests, bytes,
trained, dense: nats of each}}."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a model is accepted, why in one sentence, and the `slipped` of its record."""

    accepted: bool
    why: str
    slipped: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A new model less an old one in bits per byte; `windows` counts those of the new one in domains that both have.

    `stderr` is None where a domain has one window. `other` are the domains compared on other windows.
    """

    difference: float
    stderr: float | None
    windows: int
    domains: list[str]
    other: list[str]


def present(pipeline: str) -> Record:
    """The record of the result that stands in runs/PIPELINE, as if it were accepted now; without `release`."""
    run = Path("runs", pipeline)
    evaluation = summary.read(pipeline)
    path = run / "windows.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; `moeforge run {pipeline}` writes it")
    model = Path("data/models", f"{settings.load().pipeline(pipeline).model}.json")
    source = json.loads(model.read_text()) if model.is_file() else {}
    digest = source.get("source_sha256")
    return {
        **{which: float(evaluation[which]["bits_per_byte"]["mean"]) for which in ("trained", "dense")},
        "parent": digest and scratch.fingerprint([digest, source.get("dtype")]),
        "slipped": 0.0,
        "code": commit(pipeline),
        "date": datetime.now(UTC).isoformat(timespec="microseconds"),
        "dvc_lock_sha256": hashlib.sha256(Path("dvc.lock").read_bytes()).hexdigest(),
        "domains": {
            domain: {key: entry[key] for key in ("windows", "bytes", "trained", "dense")}
            for domain, entry in json.loads(path.read_text()).items()
        },
    }


def commit(pipeline: str) -> str | None:
    """The git commit whose code trained the present model (with + if its tree differed), by the pretrain metrics."""
    path = Path("runs", pipeline, "pretrain.json")
    code = json.loads(path.read_text()).get("code") if path.is_file() else None
    return None if code is None else str(code)


def decide(new: Record, old: Record | None, *, tolerance: float) -> Decision:
    """Apply the rule. A figure that is not finite is refused; the first model is accepted."""
    figures = [new["trained"], *(nats for entry in new["domains"].values() for nats in entry["trained"])]
    if not all(math.isfinite(figure) for figure in figures):
        return Decision(accepted=False, why=f"refused: {new['trained']} bits per byte is not a figure to accept")
    if old is None:
        return Decision(accepted=True, why=f"accepted: the first model, {new['trained']:.4f} bits per byte")
    comparison = compare(new, old)
    if comparison is None:
        why = "refused: the accepted model was evaluated on none of these domains, so the two cannot be compared; if "
        return Decision(accepted=False, why=f"{why}this one is to be shipped, accept it with `moeforge release`")
    allowed = tolerance + ERRORS * (comparison.stderr or 0.0)
    slipped = comparison.difference + old.get("slipped", 0.0)
    accepted = slipped <= allowed
    error = "unknown, for a domain has one window" if comparison.stderr is None else f"{comparison.stderr:.4f}"
    worse = f"{abs(comparison.difference):.4f} {'worse' if comparison.difference > 0 else 'better'}"
    same = [domain for domain in comparison.domains if domain not in comparison.other]
    basis = [f"on the same windows of {', '.join(same)}"] if same else []
    basis += [f"on other windows of {', '.join(comparison.other)}"] if comparison.other else []
    where = f"n = {comparison.windows}, {' and '.join(basis)}"
    since = f", {slipped:.4f} worse than the best before it" if old.get("slipped") else ""
    why = (
        f"{'accepted' if accepted else 'refused'}: {new['trained']:.4f} bits per byte is {worse} "
        f"than the accepted {old['trained']:.4f}{since} (standard error {error}; {where}); "
        f"allowed: tolerance {tolerance:.4f} + {ERRORS:g} standard errors"
    )
    return Decision(accepted=accepted, why=why, slipped=max(slipped, 0.0))


def compare(new: Record, old: Record) -> Comparison | None:
    """How much worse `new` is than `old`, over the domains that both were evaluated on; None if there is none."""
    common = [domain for domain in new["domains"] if domain in old["domains"]]
    same_parent = new["parent"] is not None and new["parent"] == old["parent"]
    differences, variances, other = [], [], []
    for domain in common:
        first, second = new["domains"][domain], old["domains"][domain]
        at = {window: i for i, window in enumerate(second["windows"])}
        both = [(i, at[window]) for i, window in enumerate(first["windows"]) if window in at]
        if 2 * len(both) >= len(first["windows"]):
            nats = [first["trained"][i] - second["trained"][j] for i, j in both]
            difference, variance = _rate(nats, [first["bytes"][i] for i, _ in both])
        else:
            other.append(domain)
            rates = []
            for entry in (first, second):
                less = entry["dense"] if same_parent else [0.0] * len(entry["trained"])
                nats = [trained - parent for trained, parent in zip(entry["trained"], less, strict=True)]
                rates.append(_rate(nats, entry["bytes"]))
            difference, variance = rates[0][0] - rates[1][0], rates[0][1] + rates[1][1]
        differences.append(difference)
        variances.append(variance)
    if not common:
        return None
    error = math.sqrt(sum(variances)) / len(common)
    return Comparison(
        difference=statistics.fmean(differences),
        stderr=error if math.isfinite(error) else None,
        windows=sum(len(new["domains"][domain]["windows"]) for domain in common),
        domains=common,
        other=other,
    )


def accepted(pipeline: str) -> Record | None:
    """The record of the last accepted model, or None before the first."""
    path = record(pipeline)
    return {"domains": {}, "parent": None, **json.loads(path.read_text())} if path.exists() else None


def record(pipeline: str) -> Path:
    """Where the record stands."""
    return Path("runs", pipeline, "accepted.json")


def write(path: Path, record: Record) -> None:
    """Write a record as JSON whose lists take a line each, whole or not at all."""
    nested = json.dumps(record, indent=1, sort_keys=True)
    scratch.write_text(path, re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), nested) + "\n")


def _rate(nats: list[float], sizes: list[int]) -> tuple[float, float]:
    """Bits per byte of windows together, and its variance: that of a ratio of means, to first order (Cochran 1977,
    eq. 2.46). Infinite for one window."""
    count, total = len(sizes), sum(sizes)
    rate = sum(nats) / math.log(2) / total
    if count == 1:
        return rate, math.inf
    errors = [(n / math.log(2) - rate * size) * count / total for n, size in zip(nats, sizes, strict=True)]
    return rate, sum(error * error for error in errors) / (count - 1) / count

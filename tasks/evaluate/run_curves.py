"""The curves of training runs, and what they say beside each other: factors, ranges, and who passes whom where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.evaluate import speedup_factor
from tasks.evaluate.speedup_factor import BY, Curve, OutsideError

COLUMNS = ("cost of training", "factor", "its range", "at losses", "is lower from")


def read(run: Path) -> Curve:
    """The curve of a run.

    Args:
        run: runs/PIPELINE, its runs/PIPELINE/control (the dense child) or control/parent (the parent trained alike),
            or the folder under .scratch/ of one that is not finished.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: its model or its settings are not known here.
    """
    if run.name == "control":
        known = _metrics(run.parent / "control.json")
    elif run.parent.name == "control":
        known = _metrics(run.parent.parent / "control.json").get(run.name, {})
    else:
        known = _metrics(run / "pretrain.json")
    return of(str(run), known.get("curve") or _of_log(run, speed=known.get("tokens_per_second")))


def _metrics(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def of(name: str, columns: Mapping[str, Sequence[float]]) -> Curve:
    """The curve of the `curve` in pretrain.json or control.json."""
    return Curve(name=name, loss=columns["loss"], costs={by: columns[by] for by in BY if by in columns})


def _of_log(run: Path, *, speed: float | None) -> dict[str, list[float]]:
    """From the log, of a run that is not finished or that was made before metrics had a curve.

    A finished dense child's log has no timings: its seconds are those of its mean speed, in tokens/s.
    """
    from tasks.pretrain.job import JOB, Job
    from tasks.pretrain.log import cost_curve, log_file

    log = run / "training" / log_file.LOG
    record = next((path for path in (run / "training" / JOB, run / JOB) if path.is_file()), None)
    if record is None or not log.is_file():
        raise FileNotFoundError(
            f"{run}: no training run is here (training/{log_file.LOG} or {JOB} is missing); give runs/PIPELINE, "
            "runs/PIPELINE/control, or .scratch/pretrain-PIPELINE/ID of an unfinished one"
        )
    job = Job.read(record)
    configs = [folder / "config.json" for folder in (run / "trained", run / "model", job.model)]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise FileNotFoundError(f"{run}: its model is not there ({configs[-1]}), so its FLOPs cannot be counted")
    records = log_file.read(log, "step", "validation")
    curve = cost_curve.points(records, config=json.loads(config.read_text()), params=job.params)
    return {"seconds": [tokens / speed for tokens in curve["tokens"]], **curve} if speed else curve


def rows(rivals: Sequence[Curve], moe: Curve) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """A table of `moe` against dense runs, a row for each kind of cost that all have, and why there are no factors.

    Args:
        rivals: of several, the cheapest at each loss is meant.
        moe: the run whose gain is told.

    Returns:
        [(cost, a cell for each further of COLUMNS)], and sentences without repetitions.
    """
    table, reasons = [], []
    for by in BY:
        if not all(by in curve.costs for curve in (*rivals, moe)):
            continue
        dense = speedup_factor.cheapest(rivals, by=by)
        try:
            found = speedup_factor.factor(dense, moe, by=by)
            cells = [
                f"{found.value:.2f} ×",
                f"{found.lowest:.2f} to {found.highest:.2f} ×",
                f"{found.loss:.3f} ({found.highest_loss:.3f} to {found.loss:.3f})",
            ]
        except OutsideError as error:
            cells = ["–"] * 3
            reasons.append(f"{error}.")
        table.append((by, [*cells, _passing(dense, moe, by=by)]))
    return table, list(dict.fromkeys(reasons))


def _passing(dense: Curve, moe: Curve, *, by: str) -> str:
    try:
        at = speedup_factor.passes(moe, dense, by=by)
    except OutsideError:
        return "–"
    if at is None:
        return "not at the end"
    first = max(next(c for c in curve.costs[by] if c > 0) for curve in (dense, moe))
    everywhere = " (all evaluations)" if at <= first * (1 + 1e-9) else ""
    return f"{amount(at, by=by)}{everywhere}"


def amount(value: float, *, by: str) -> str:
    """A cost in words: 12,288 tokens, 5.2e+13 FLOPs, 160 s."""
    return {"tokens": f"{value:,.0f}", "flops": f"{value:.3g}", "seconds": f"{value:,.0f} s"}[by]


def explanation(dense: str, moe: str) -> str:
    """What the columns of `rows` mean."""
    return (
        f"factor: cost of {dense} over that of {moe} at the lowest validation loss that both reached; above 1, {moe} "
        "needs less. Interpolated in the logarithm of the cost between neighbouring evaluations, with its range over "
        "all losses that both passed; nothing is extrapolated. seconds: training steps alone."
    )

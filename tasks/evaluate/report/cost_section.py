"""The page's section on the cost of training: loss against FLOPs, seconds and tokens, and the speed-up factor."""

from __future__ import annotations

from markupsafe import Markup

from tasks.evaluate import run_curves, summary
from tasks.evaluate.report import charts
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Figure, Section, Table

_NAMES = ("dense child", "Mixture-of-Experts")
_UNITS = {
    "flops": ("FLOPs of training", "FLOPs"),
    "seconds": ("time of training", "s"),
    "tokens": ("tokens", "tokens"),
}


def section(results: Results) -> Section | None:
    """None without a dense child, or where the metrics of the two runs have no curves."""
    found = [metrics.get("curve") for metrics in (results.control, results.pretrain)]
    if not all(found):
        return None
    child, moe = (run_curves.of(name, curve) for name, curve in zip(_NAMES, found, strict=True) if curve)
    figures = []
    for by, (title, unit) in _UNITS.items():
        if by not in child.costs or by not in moe.costs:
            continue
        size, prefix = summary.unit(max(*child.costs[by], *moe.costs[by])) if by == "flops" else (1.0, "")
        series = {
            curve.name: [(cost / size, loss) for cost, loss in zip(curve.costs[by], curve.loss, strict=True)]
            for curve in (moe, child)
        }
        chart = charts.lines(series, x_label=f"{prefix}{unit}", y_label="validation loss, nats per token")
        figures.append(Figure(title=f"Loss by {title}", chart=Markup(chart)))
    rows, reasons = run_curves.rows([child], moe)
    made = sum(results.partition["seconds"].values())
    cut = sum(results.control["seconds"].get(part, 0.0) for part in ("masks", "cut"))
    note = (
        f"Training alone, both on the same batches, from where the experts and the child were made ({made:,.0f} s and "
        f"{cut:,.0f} s)."
    )
    return Section(
        title="What training cost",
        notes=[note, *(f"No speed-up factor: {reason}" for reason in reasons), run_curves.explanation(*_NAMES)],
        figures=figures,
        tables=[Table(columns=run_curves.COLUMNS[1:], groups=[{"title": "", "basis": "", "rows": rows}])],
    )

"""The page's section on the cost of training: loss against FLOPs, seconds and tokens, and the speed-up factor."""

from __future__ import annotations

from markupsafe import Markup

from tasks.evaluate import run_curves, summary
from tasks.evaluate.report import charts
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Figure, Section, Table

_MOE = "Mixture-of-Experts"
_UNITS = {
    "flops": ("FLOPs of training", "FLOPs"),
    "seconds": ("time of training", "s"),
    "tokens": ("tokens", "tokens"),
}


def section(results: Results) -> Section | None:
    """Of the sparse model, its dense child, and the parent where it was trained alike.

    None without a child, or where the metrics of the two have no curves.
    """
    alike = results.control.get("parent", {})
    found = {"dense child": results.control.get("curve"), "parent trained alike": alike.get("curve")}
    rivals = [run_curves.of(name, curve) for name, curve in found.items() if curve]
    if not rivals or not results.pretrain.get("curve"):
        return None
    moe = run_curves.of(_MOE, results.pretrain["curve"])
    curves = [moe, *rivals]
    figures = []
    for by, (title, unit) in _UNITS.items():
        if not all(by in curve.costs for curve in curves):
            continue
        most = max(cost for curve in curves for cost in curve.costs[by])
        size, prefix = summary.unit(most) if by == "flops" else (1.0, "")
        series = {
            curve.name: [(cost / size, loss) for cost, loss in zip(curve.costs[by], curve.loss, strict=True)]
            for curve in curves
        }
        chart = charts.lines(series, x_label=f"{prefix}{unit}", y_label="validation loss, nats per token")
        figures.append(Figure(title=f"Loss by {title}", chart=Markup(chart)))
    made = sum(results.partition["seconds"].values())
    cut = sum(seconds for part, seconds in results.control["seconds"].items() if part not in ("training", "parent"))
    notes = [
        f"Training alone, all on the same batches, from where the experts and the child were made ({made:,.0f} s and "
        f"{cut:,.0f} s)."
    ]
    groups = []
    for rival in rivals:
        rows, reasons = run_curves.rows([rival], moe)
        notes += [f"No speed-up factor: {reason}" for reason in reasons]
        groups.append({"title": f"against the {rival.name}", "basis": "", "rows": rows})
    notes.append(run_curves.explanation("the rival", f"the {_MOE}"))
    return Section(
        title="What training cost",
        notes=notes,
        figures=figures,
        tables=[Table(columns=run_curves.COLUMNS[1:], groups=groups)],
    )

"""The page's section on an elastic model: quality and speed at each top_k that it serves."""

from __future__ import annotations

from tasks.evaluate import summary
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Section, Table
from tasks.evaluate.speeds import speed_table


def section(results: Results) -> Section | None:
    """What an elastic model gives at each top_k that it serves; None for any other."""
    evaluation = results.evaluation
    settings = evaluation["trained"].get("elastic")
    if not settings:
        return None
    row = speed_table.headline(evaluation.get("speed", {}))
    parent = evaluation["dense"]["perplexity"]["mean"]
    usual = str(evaluation["routing"]["top_k"])
    rows = []
    for top_k, at in settings.items():
        cells = [
            summary.count(at["active"]),
            summary.count(at["flops_per_token"]),
            f"{at['bits_per_byte']['mean']:.3f}",
            f"{at['perplexity']['mean']:.2f}",
            f"{at['perplexity']['mean'] / parent:.2f} ×",
        ]
        if row:
            models = row["models"] if top_k == usual else row.get("elastic", {}).get(top_k, {})
            cells += [cell for _, (cell,) in speed_table.cells({**row, "models": models}, ["trained"])[:2]]
        rows.append((f"top_k {top_k}" + " (as it loads)" * (top_k == usual), cells))
    columns = ["active parameters", "FLOPs per token", "bits per byte", "perplexity", "× the parent's"]
    columns += ["prompt, tokens/s", "decode, tokens/s"] if row else []
    note = "One checkpoint: the number of routed experts of a token is chosen when it is loaded."
    if row:
        note += f" Speed in {speed_table.title(row)}, and × the dense parent's."
    return Section(
        title="One model at several speeds",
        notes=[note],
        tables=[Table(columns=columns, groups=[{"title": "", "basis": "", "rows": rows}])],
    )

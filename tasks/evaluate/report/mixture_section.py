"""The page's section on domain weights that were estimated: beside others, with spread, evidence and cost."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tasks.evaluate import summary
from tasks.evaluate.report import charts, mixture_charts
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Figure, Section, Table

_SHOWN = ("units", "trajectory", "fit", "spread", "cost")
"""Evidence that a static method does not have."""
_SPREAD = {"bootstrap": "fits to resampled units", "seeds": "seeds"}


def section(results: Results) -> Section | None:
    """What an estimate rests on; None for a method that trains nothing and whose weights no cap has lowered."""
    evidence = results.mixture["evidence"]
    if not any(evidence.get(part) for part in (*_SHOWN, "capped")):
        return None
    return Section(
        title="Domain weights",
        notes=[note for note in (_basis(results), _fit(evidence), _left_out(evidence), _cost(evidence)) if note],
        figures=_figures(results),
        tables=[_table(results)],
    )


def _basis(results: Results) -> str:
    method, target = results.mixture["method"], results.pipeline.mixture.target
    evidence = results.mixture["evidence"]
    parts = [f"Weights by method `{method}`"]
    if any(evidence.get(part) for part in _SHOWN):
        aim = "the mean loss of the domains" if target == "mean" else f"the loss of {_named(target)}"
        parts.append(f", which minimises {aim}")
    if units := evidence.get("units"):
        parts.append(f", from {len(units)} trainings of a proxy on different mixes")
    if spread := evidence.get("spread"):
        over = _SPREAD[evidence["spread_over"]]
        parts.append(f"; ± is the standard deviation over {over}, {max(spread.values()):.3f} at most")
    return f"{''.join(parts)}. {_capped(results)}".strip()


def _named(target: Any) -> str:
    return target if isinstance(target, str) else ", ".join(f"{name} × {weight:g}" for name, weight in target.items())


def _capped(results: Results) -> str:
    evidence = results.mixture["evidence"]
    if not (capped := evidence.get("capped")):
        return ""
    shares = ", ".join(f"{domain} (would have {share:.3f})" for domain, share in capped.items())
    return f"No domain is read more than {evidence['max_epochs']:g} times, which lowers {shares}."


def _fit(evidence: dict[str, Any]) -> str:
    fit = evidence.get("fit")
    if not fit or fit["spearman"] is None:  # where all losses are the same
        return ""
    return (
        f"On {len(fit['measured'])} mixes that the fit had not seen, predicted and measured losses have the rank "
        f"correlation {fit['spearman']:.2f} (Spearman)."
    )


def _left_out(evidence: dict[str, Any]) -> str:
    left = [f"{each['unit']} ({each['why']})" for each in evidence.get("left_out") or []]
    return f"Left out: {'; '.join(left)}." if left else ""


def _cost(evidence: dict[str, Any]) -> str:
    if not (cost := evidence.get("cost")):
        return ""
    flops = f" and {cost['flops_share']:.0%} of its FLOPs" if "flops_share" in cost else ""
    return (
        f"The estimate took {cost['tokens']:,} tokens of proxies and {summary.count(cost['flops'])} FLOPs: "
        f"{cost['share_of_training']:.0%} of the tokens of the training that it serves{flops}."
    )


def _columns(results: Results) -> dict[str, dict[str, float]]:
    """{method: {domain: share}}, the chosen method first."""
    mixture = results.mixture
    others = {name: mixture["evidence"][name] for name in ("uniform", "proportional")}
    return {mixture["method"]: mixture["weights"]} | {
        name: shares for name, shares in others.items() if name != mixture["method"]
    }


def _figures(results: Results) -> list[Figure]:
    evidence, columns = results.mixture["evidence"], _columns(results)
    weights = results.mixture["weights"]
    rows = {domain: {name: shares[domain] for name, shares in columns.items()} for domain in weights}
    spread = evidence.get("spread") or {}
    caption = "The bar is one standard deviation of the estimate to each side." if spread else ""
    chart = mixture_charts.shares(rows, spread=spread, label="share of the training tokens")
    shown = [Figure(title="Weights", chart=Markup(chart), caption=caption)]
    if fit := evidence.get("fit"):
        chart = mixture_charts.agreement(fit["predicted"], fit["measured"], label="nats per token")
        caption = "Held-out mixes; on the line both are equal."
        shown.append(Figure(title="Predicted and measured loss", chart=Markup(chart), caption=caption))
    if trajectory := evidence.get("trajectory"):
        series = {
            domain: [(float(point["step"]), point["weights"][domain]) for point in trajectory] for domain in weights
        }
        chart = charts.lines(series, x_label="step of the proxy", y_label="share", zero=True)
        shown.append(Figure(title="Weights while the proxy trained", chart=Markup(chart)))
    return shown


def _table(results: Results) -> Table:
    evidence, columns = results.mixture["evidence"], _columns(results)
    spread, budget = evidence.get("spread") or {}, results.pipeline.pretrain.tokens
    rows = []
    for domain, weight in results.mixture["weights"].items():
        own = f"{weight:.3f} ± {spread[domain]:.3f}" if domain in spread else f"{weight:.3f}"
        others = [f"{shares[domain]:.3f}" for shares in list(columns.values())[1:]]
        cap = f" (cap {evidence['max_epochs']:g})" if domain in evidence["capped"] else ""
        read = [f"{weight * budget:,.0f}", f"{evidence['epochs'][domain]:.2f}{cap}"]
        rows.append((domain, [own, *others, f"{evidence['tokens'][domain]:,}", *read]))
    titles = [*columns, "training text, tokens", "read, tokens", "epochs"]
    return Table(columns=titles, groups=[{"title": "", "basis": "", "rows": rows}])

"""The report's training section: a summary, curves, the gap to the dense parent, and events."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tasks.evaluate.report import charts
from tasks.evaluate.report.results import Results

EVENTS = 40  # rows of the table of what training reported


def section(results: Results) -> dict[str, Any]:
    """The template's variables."""
    return {"summary": summary(results), "figures": figures(results), "gap": gap(results), "events": events(results)}


def summary(results: Results) -> str:
    """The settings and the speed of training, in two sentences."""
    knobs, ran = results.pipeline.pretrain, results.pretrain
    decay = {"cosine": "cosine decay", "wsd": "a decay at the end (WSD)", "linear": "linear decay"}
    trained = [] if knobs.train == "all" else [f"trained: {', then '.join(part for _, part in knobs.phases)}"]
    balance = (
        [f"balance `{knobs.balance.loss}` × {knobs.balance.coefficient:g}"] if knobs.balance.loss != "none" else []
    )
    distilled = ["distilled from the dense parent"] if knobs.distill else []
    parts = [
        f"{ran['steps']} steps of {knobs.batch} × {knobs.seq_len} tokens ({ran['tokens']:,} in all)",
        f"learning rate {knobs.learning_rate:g} with {decay.get(knobs.schedule, 'no decay')}",
        ran["precision"],
        f"ZeRO stage {knobs.zero_stage} over {ran['processes']} process{'es' if ran['processes'] > 1 else ''}",
        f"{'moving' if knobs.moves_weights else 'fixed'} domain weights",
        *trained,
        *balance,
        *distilled,
    ]
    return (
        f"{', '.join(parts)}. {ran['tokens_per_second']:,.0f} tokens/s, {ran['mfu']:.0%} MFU on active parameters, "
        f"{ran['seconds'] / 60:.1f} minutes."
    )


def figures(results: Results) -> list[dict[str, Any]]:
    """Loss curves with the dense parent's losses, and the domain weights where they moved."""
    domains = [series for series in results.validation if series != "mean"]
    curves = {domain: results.validation[domain] for domain in domains} | {"training batches": results.loss}
    caption = (
        f"Validation loss on {results.pipeline.pretrain.eval_windows} windows per domain, and the loss of the "
        "training batches, whose domains vary."
    )
    if results.references:
        caption += " Dashed: the dense parent on the same windows."
    chart = charts.lines(
        curves,
        x_label="training tokens",
        y_label="nats per token",
        faint="training batches",
        levels=results.references,
    )
    charts_shown = [{"title": "Loss", "chart": Markup(chart), "caption": caption}]
    knobs = results.pipeline.pretrain
    own = ", ".join(f"{part} {rate:g}" for part, rate in knobs.learning_rates.items())
    of_steps = (
        (
            "Learning rate",
            "learning rate",
            results.rate,
            f"Parts with other peaks, on the same curve: {own}." if own else "",
        ),
        ("Gradient norm", "norm before clipping", results.gradient, f"Larger norms are clipped to {knobs.clip:g}."),
    )
    for title, y_label, points, caption in of_steps:
        if chart := charts.lines({title.lower(): points}, x_label="training tokens", y_label=y_label, zero=True):
            charts_shown.append({"title": title, "chart": Markup(chart), "caption": caption})
    if results.weights:
        ordered = {domain: results.weights[domain] for domain in domains if domain in results.weights}
        chart = charts.lines(ordered, x_label="training tokens", y_label="share of the batches", zero=True)
        caption = "Dynamic batch loading: a domain above its reference loss gains weight."
        charts_shown.append({"title": "Domain weights", "chart": Markup(chart), "caption": caption})
    return charts_shown


def gap(results: Results) -> list[tuple[str, list[str]]]:
    """The share of the loss added by the split that training recovered: (domain, [split, trained, dense, share]).

    (split - trained) / (split - dense) on the windows of the evaluation; its mean is `recovery` in evaluation.json. A
    domain in which the split added no loss has no share; without `recovery` there is no table.
    """
    evaluation = results.evaluation
    if "recovery" not in evaluation:
        return []
    rows = []
    for label, dense in evaluation["dense"]["loss"].items():
        split, trained = (evaluation[key]["loss"][label] for key in ("split", "trained"))
        closed = f"{(split - trained) / (split - dense):.0%}".replace("-", "−") if split > dense else "–"
        rows.append((label, [*(f"{loss:.3f}" for loss in (split, trained, dense)), closed]))
    return rows


def events(results: Results) -> list[dict[str, Any]]:
    """The first EVENTS events that training reported."""
    shown = [{"step": event["step"], "message": event["message"]} for event in results.events[:EVENTS]]
    if (more := len(results.events) - len(shown)) > 0:
        shown.append({"step": "", "message": f"{more:,} more in training/log.jsonl"})
    return shown

"""The report's training section: what was trained, its curves, how much of the gap it closed, what it reported."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tasks.evaluate import charts
from tasks.evaluate.results import Results

EVENTS = 40  # rows of the table of what training reported


def section(results: Results) -> dict[str, Any]:
    """The template's variables."""
    return {"what": what(results), "figures": figures(results), "gap": gap(results), "events": events(results)}


def what(results: Results) -> str:
    """What was trained and how fast, in two sentences."""
    knobs, ran = results.pipeline.pretrain, results.pretrain
    decay = {"cosine": "cosine decay", "wsd": "a decay at the end (WSD)", "linear": "linear decay"}
    trained = [] if knobs.train == "all" else [f"trained: {', then '.join(what for _, what in knobs.phases)}"]
    balance = (
        [f"balance `{knobs.balance.loss}` × {knobs.balance.coefficient:g}"] if knobs.balance.loss != "none" else []
    )
    distilled = ["distilled from the dense parent"] if knobs.distill else []
    parts = [
        f"{ran['steps']} steps of {knobs.batch} × {knobs.seq_len} tokens ({ran['tokens']:,} in all)",
        f"learning rate {knobs.learning_rate:g} with {decay.get(knobs.schedule, 'no decay')}",
        ran["precision"],
        f"ZeRO stage {knobs.zero_stage} over {ran['processes']} process{'es' if ran['processes'] > 1 else ''}",
        f"{'moving' if knobs.dynamic else 'fixed'} domain weights",
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
        f"Validation loss per domain on {results.pipeline.pretrain.eval_windows} windows each, and the loss of every "
        "training batch (whose domains differ from batch to batch)."
    )
    if results.references:
        caption += " Dashed: the dense parent's on the same windows."
    chart = charts.lines(
        curves,
        x_label="training tokens",
        y_label="nats per token",
        faint="training batches",
        levels=results.references,
    )
    found = [{"title": "Loss", "chart": Markup(chart), "caption": caption}]
    if results.weights:
        ordered = {domain: results.weights[domain] for domain in domains if domain in results.weights}
        chart = charts.lines(ordered, x_label="training tokens", y_label="share of the batches", zero=True)
        caption = "Dynamic batch loading: domains above their reference loss gain weight."
        found.append({"title": "Domain weights", "chart": Markup(chart), "caption": caption})
    return found


def gap(results: Results) -> dict[str, Any] | None:
    """How much of what the split lost training won back; None where the parent wasn't judged on the same windows.

    (before - after) / (before - parent), per domain and of the means that count each domain the same. A domain in
    which the split lost nothing has no gap.
    """
    before, after = (results.pretrain.get(key) or {} for key in ("validation_before", "validation_after"))
    parent = results.references
    domains = [domain for domain in before if domain in after and domain in parent]
    if not domains:
        return None
    table = {domain: (before[domain], after[domain], parent[domain]) for domain in domains}
    if len(domains) == len(before):
        table["mean"] = tuple(sum(values) / len(values) for values in zip(*table.values(), strict=True))
    rows = []
    for label, (split, trained, dense) in table.items():
        closed = f"{(split - trained) / (split - dense):.0%}".replace("-", "−") if split > dense else "–"
        rows.append((label, [*(f"{loss:.3f}" for loss in (split, trained, dense)), closed]))
    basis = "Gap closed: the share of the split's loss that training recovered, on the windows of its own evaluations."
    return {"basis": basis, "rows": rows}


def events(results: Results) -> list[dict[str, Any]]:
    """What training reported, the first EVENTS of it."""
    shown = [{"step": event["step"], "message": event["message"]} for event in results.events[:EVENTS]]
    if (more := len(results.events) - len(shown)) > 0:
        shown.append({"step": "", "message": f"and {more:,} more, in training/log.jsonl"})
    return shown

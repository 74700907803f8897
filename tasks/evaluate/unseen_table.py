"""The figures on unseen domains as rows and as a sentence, from evaluation.json alone; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tasks.evaluate.wording import signed

Rows = list[tuple[str, list[str]]]
METRICS = (("bits_per_byte", "bits per byte", 3), ("perplexity", "perplexity", 2))


def domains(evaluation: dict[str, Any]) -> list[str]:
    """The unseen domains that were judged."""
    return list(evaluation["test"].get("unseen", {}))


def rows(evaluation: dict[str, Any], columns: Sequence[str]) -> Rows:
    """The terminal's rows: bits per byte, mean perplexity, and the multiples; none without unseen domains.

    Args:
        columns: the models, keys of evaluation.json.
    """
    if not domains(evaluation):
        return []
    table = [(f"bits/byte, unseen: {row}", values) for row, values in figures(evaluation, columns, "bits_per_byte", 3)]
    _, mean = figures(evaluation, columns, "perplexity", 2)[-1]
    ratios = [(f"perplexity / the parent's: {title}", values) for title, values in multiples(evaluation, columns)]
    return [*table, ("perplexity, unseen: mean", mean), *ratios]


def groups(evaluation: dict[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The same as groups of rows for the page's table."""
    if not domains(evaluation):
        return []
    found = [
        {"title": f"{title}, unseen text", "basis": "", "rows": figures(evaluation, columns, metric, digits)}
        for metric, title, digits in METRICS
    ]
    return [*found, {"title": "perplexity over the parent's", "basis": "", "rows": multiples(evaluation, columns)}]


def figures(evaluation: dict[str, Any], columns: Sequence[str], metric: str, digits: int) -> Rows:
    """A row for each unseen domain and for their mean."""
    models = [evaluation[key]["unseen"][metric] for key in columns]
    return [(row, [f"{model[row]:.{digits}f}" for model in models]) for row in [*domains(evaluation), "mean"]]


def multiples(evaluation: dict[str, Any], columns: Sequence[str]) -> Rows:
    """Each model's perplexity over the parent's, on trained and on unseen domains."""
    ratios = [evaluation[key].get("multiple") for key in columns]
    return [
        (title, [f"{ratio[key]:.2f} ×" if ratio else "–" for ratio in ratios])
        for key, title in (("domains", "trained domains"), ("unseen", "unseen domains"))
    ]


def sentence(evaluation: dict[str, Any]) -> str:
    """The trained model's multiples and differences on both groups of domains; "" without unseen ones.

    The windows of the two groups are drawn independently, so the variances of the two differences add up.
    """
    if not (names := domains(evaluation)):
        return ""
    differences, ratios = evaluation["difference"], evaluation["trained"]["multiple"]
    here, there = differences["trained_dense"], differences["unseen"]["trained_dense"]
    gap = {"loss": there["loss"] - here["loss"]}
    if "stderr" in here and "stderr" in there:
        gap["stderr"] = math.hypot(here["stderr"], there["stderr"])
    windows = sum(domain["windows"] for domain in evaluation["test"]["unseen"].values())
    others = [f"{signed(there)} compared with the dense parent (minus that on the trained domains: {signed(gap)})"]
    if (child := differences["unseen"].get("trained_child")) is not None:
        others.append(f"{signed(child)} compared with the dense child")
    return (
        f"Unseen text ({', '.join(names)}: {windows} windows), of which no stage has read any: after training the "
        f"perplexity is {ratios['unseen']:.2f} × the parent's, on the trained domains {ratios['domains']:.2f} ×; mean "
        f"loss, in nats/token and paired by window: {', '.join(others)}."
    )

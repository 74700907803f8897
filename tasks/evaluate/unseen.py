"""Text of domains that no stage has read: its figures, and how many times the parent's perplexity a model has there.

A model that is healed on some domains does better on them than on others. Its multiple of the parent's perplexity on
the trained domains is therefore the better one; that on unseen domains is what a user's own text meets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.evaluate import likelihood
from tasks.moe import loss


def add(
    summary: dict[str, Any],
    nats: Mapping[str, Mapping[str, list[float]]],
    counted: Mapping[str, Mapping[str, int]],
    *,
    pairs: Sequence[tuple[str, str]],
) -> None:
    """Put the figures on unseen domains into evaluation.json, and each model's multiple of the parent's perplexity.

    Args:
        summary: the content so far, with each model's figures on the trained domains; gets MODEL.unseen
            (likelihood.scores), MODEL.multiple, difference.unseen and test.unseen.
        nats: {model: {unseen domain: [summed nats of each window]}}.
        counted: likelihood.counts of these windows; {} without such domains, and then only MODEL.multiple is added.
        pairs: models whose losses are compared, first minus second.
    """
    if counted:
        summary["test"]["unseen"] = dict(counted)
        for key, each in nats.items():
            summary[key]["unseen"] = likelihood.scores(each, counted)
        differences = {f"{a}_{b}": likelihood.difference(nats[a], nats[b], counted) for a, b in pairs}
        summary["difference"]["unseen"] = differences
    for key in nats.keys() - {"dense"}:
        summary[key]["multiple"] = multiple(summary[key], summary["dense"])


def multiple(model: Mapping[str, Any], parent: Mapping[str, Any]) -> dict[str, float]:
    """A model's perplexity over its parent's: {domains: on the trained ones; unseen: on the others, if there are any}.

    Args:
        model: an entry of evaluation.json.
        parent: that of the dense parent.
    """
    ratios = {"domains": loss.perplexity(model["loss"]["mean"] - parent["loss"]["mean"])}
    if "unseen" in model:
        ratios["unseen"] = loss.perplexity(model["unseen"]["loss"]["mean"] - parent["unseen"]["loss"]["mean"])
    return ratios

"""What is said of checkpoints that were measured: the figures of each, and the first less the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.evaluate import likelihood, routing_balance
from tasks.evaluate.downstream import judging, paired
from tasks.evaluate.machine import machine
from tasks.moe import device, loss

if TYPE_CHECKING:
    from tasks.tools.evaluate.checkpoints import Checkpoint
    from tasks.tools.evaluate.request import Request


def summarise(request: Request, done: Sequence[Mapping[str, Any]], *, missing: Mapping[str, str]) -> dict[str, Any]:
    """What `evaluate` returns, from the measurements of each checkpoint in the order of the request."""
    unseen, counted = request.passages.unseen, done[0]["counted"]
    groups = {"domains": [domain for domain in counted if domain not in unseen], "unseen": unseen}
    models = [_model(request, one, each, groups) for one, each in zip(request.checkpoints, done, strict=True)]
    for model, each in zip(models, done, strict=True):
        model["tasks"] = {name: entry["scores"] for name, entry in each["tasks"].items() if name not in missing}
    names = [str(i) for i in range(len(done))]
    items = judging.by_item({name: each["tasks"] for name, each in zip(names, done, strict=True)}, missing=missing)
    on_items = paired.differences(items, [(names[0], name) for name in names[1:]])
    difference = [
        {"against": str(other.path), "unit": "nats/token" if request.by_ids else "bits/byte"}
        | {
            group: _difference(done[0]["nats"], result["nats"], _some(counted, domains), by_ids=request.by_ids)
            for group, domains in groups.items()
            if domains
        }
        | {
            "tasks": {
                task: {metric: by_pair[f"{names[0]}_{name}"] for metric, by_pair in by_metric.items()}
                for task, by_metric in on_items.items()
            }
        }
        for name, other, result in list(zip(names, request.checkpoints, done, strict=True))[1:]
    ]
    text: dict[str, Any] = {
        "source": request.passages.source,
        "by": "ids" if request.by_ids else "text",
        "seq_len": request.passages.seq_len,
        "batch": request.batch,
        "dtype": request.dtype,
    }
    text |= {group: _some(counted, domains) for group, domains in groups.items() if domains}
    return {
        "text": text,
        "models": models,
        "difference": difference,
        "paired": {"level": paired.LEVEL, "draws": paired.DRAWS},
        "missing": dict(missing),
        "machine": machine(device.default()),
    }


def _model(
    request: Request, checkpoint: Checkpoint, done: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    def scores(domains: Sequence[str]) -> dict[str, Any]:
        some = _some(done["nats"], domains)
        if request.by_ids:
            return dict(likelihood.scores(some, done["counted"]))
        bits = {d: loss.bits_per_byte(sum(sums), num_bytes=done["counted"][d]["bytes"]) for d, sums in some.items()}
        return {"bits_per_byte": bits | {"mean": statistics.fmean(bits.values())}}

    kept = ("class", "parameters", "flops_per_token", "load", "changed", "details", "seconds")
    entry = {"path": str(checkpoint.path), **_some(done, [field for field in kept if field in done])}
    entry |= scores(groups["domains"])
    if groups["unseen"]:
        entry["unseen"] = scores(groups["unseen"])
    if done["load"]:
        experts = done["experts"]
        balance = routing_balance.balance(done["load"], layers=experts["layers"], top_k=experts["top_k"])
        entry["routing"] = {"experts": experts["experts"], "top_k": experts["top_k"], "balance": balance}
    return entry


def _difference(
    first: Mapping[str, list[float]], second: Mapping[str, list[float]], counted: Mapping[str, Any], *, by_ids: bool
) -> dict[str, float]:
    """likelihood.difference on the domains of `counted`, in bits per byte where there are no tokens to compare."""
    first, second = _some(first, list(counted)), _some(second, list(counted))
    if by_ids:
        return likelihood.difference(first, second, counted)
    sizes = {d: {"windows": entry["windows"], "tokens": entry["bytes"]} for d, entry in counted.items()}
    return {key: value / math.log(2) for key, value in likelihood.difference(first, second, sizes).items()}


def _some(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: table[key] for key in keys}

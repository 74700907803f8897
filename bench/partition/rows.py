"""The rows of the comparison: bounds, pruning, and what the partition stage makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.partition import baselines
from bench.partition.baselines import Build
from tasks.partition.methods import NAMES
from tasks.settings import Partition

SHARES = (50, 75, 25)  # in the order in which they are computed
CALIBRATION = 28
"""Training windows by default, the same ones for every row with the same seed."""
LLAMA_MOE = {"scale": "paper", "gate": "tanh", "router": "random"}
"""LLaMA-MoE (arXiv 2406.16554) right after its conversion, with a linear router fitted to its gate."""
SEEDED = {"random", "clustering", "LLaMA-MoE, random", "LLaMA-MoE, clustering", "activation, 64 experts"}
"""Rows of the stage that are made with every seed; the others, which seeds change little, with the first."""
FIT_PASSES = 1  # of every row with a fit
_FITTED: dict[str, dict[str, Any]] = {
    "": {},
    ", refit": {"down_proj": "refit"},
    ", refit and fit": {"down_proj": "refit", "fit_passes": FIT_PASSES},
}
_WIDE = (8, 16, 24, 48)
"""Experts in all, of 192, 96, 64 and 32 neurons where the FFN has 1,536: widths and numbers that engines run."""
_FINE = (
    *((total, "") for total in (64, 192, 384, 768)),
    *((total, ", refit") for total in (*_WIDE, 64, 384)),
    (384, ", refit and fit"),
)
"""Experts in all, and what is fitted."""


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A row that is no settings of the stage."""

    build: Build
    calibrated: bool = False
    timed: bool = True
    """False for oracles, which compute every neuron and then drop some."""


def plain(share: int) -> dict[str, Plain]:
    """Bounds and pruning with `share` per cent of the FFN active; for 100, the dense model alone."""
    if share == 100:
        return {"dense": Plain(build=baselines.dense)}
    part = share / 100
    pruned = {
        "": baselines.static(part),
        ", refit": baselines.static(part, refit=True),
        ", refit and fit": baselines.static(part, refit=True, fit_passes=FIT_PASSES),
    }
    return {
        "oracle: top neurons by activation": Plain(build=baselines.neuron_oracle(part), timed=False),
        "oracle: top neurons by contribution": Plain(build=baselines.neuron_oracle(part, weighted=True), timed=False),
        **{f"static pruning{fitted}": Plain(build=build, calibrated=True) for fitted, build in pruned.items()},
    }


def methods(width: int, *, calibration: int = CALIBRATION) -> dict[str, dict[int, Partition]]:
    """The rows that the stage itself makes, by share of the FFN active, for an FFN of `width` neurons."""
    quarter = {share: share // 25 for share in SHARES}
    eighths = {share: {"experts": 8, "top_k": 2 * n} for share, n in quarter.items()}
    shared = {share: {"experts": 8 - n, "top_k": n, "shared_experts": n} for share, n in quarter.items()}

    def fine(total: int) -> dict[int, dict[str, int]]:
        always = {25: total // 8, 50: total // 4, 75: total // 2}  # shared
        return {
            share: {"experts": total - s, "shared_experts": s, "top_k": total * share // 100 - s}
            for share, s in always.items()
        }

    quarters = {
        share: {
            "experts": 4,
            "top_k": 1,
            "expert_size": width * n // 4,
            "common_neurons": width * max(n, 2 * n - 2) // 6,
        }
        for share, n in quarter.items()
    }

    def clusters(total: int) -> dict[int, dict[str, int]]:
        halves = {share: {"shared_experts": 1, "expert_size": width * share // 200} for share in SHARES}
        return {share: {"experts": total, "top_k": 1, **half} for share, half in halves.items()}

    def row(method: str, sizes: dict[int, dict[str, int]], **options: Any) -> dict[int, Partition]:
        common = {"method": method, "calibration_windows": calibration, "router": "regression", **options}
        return {share: Partition.model_validate({**common, **sizes[share]}) for share in SHARES}

    listed = {"importance", "moebert", "token_clusters", "activation", "copy"}  # below; copies are not of one share
    return {
        **{method: row(method, eighths) for method in NAMES if method not in listed},
        "importance": row("importance", eighths, sharing="none"),
        "importance, inner sharing": row("importance", eighths, sharing="inner"),
        "importance, inter sharing": row("importance", shared, sharing="inter"),
        "moebert": row("moebert", quarters),
        "MoEBERT": row("moebert", quarters, router="random"),
        "LLaMA-MoE, random": row("random", eighths, **LLAMA_MOE),
        "LLaMA-MoE, clustering": row("clustering", eighths, rows=["up"], metric="cosine", **LLAMA_MOE),
        **{
            f"token clusters, {total} experts, refit": row("token_clusters", clusters(total), down_proj="refit")
            for total in (8, 16)
        },
        "activation, 8 experts": row("activation", shared),
        **{
            f"activation, {total} experts{fitted}": row("activation", fine(total), **_FITTED[fitted])
            for total, fitted in _FINE
            if width % total == 0
        },
    }

"""Whether the engines that a pipeline names load what its partition makes and run it well; else, which shapes they do.

shapes.require(dense_config, partition)          # raises ValueError with the nearest shapes that work
shapes.warnings(dense_config, partition)         # what will be slow
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from tasks import architectures
from tasks.engines import limits
from tasks.engines.table import ENGINES
from tasks.partition import exporters
from tasks.settings import Partition
from tasks.settings.partition import Engine

SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an engine makes of a model."""

    engine: Engine
    refused: str
    """Why it cannot load it or computes another model; empty if it can."""
    slow: str
    """Why it runs it slowly; empty if it does not, or if it is refused."""
    context: int
    """Tokens up to which it computes what transformers 5 does."""


def verdict(engine: Engine, config: Any) -> Verdict:
    """What an engine makes of a model with this config object."""
    refused = limits.check(engine, config)
    slow = "" if refused else limits.slow(engine, config)
    return Verdict(engine=engine, refused=refused, slow=slow, context=limits.context(engine, config))


def verdicts(fields: dict[str, Any]) -> list[Verdict]:
    """What every engine that is known here makes of a model with this config.json."""
    config = _largest(AutoConfig.for_model(**fields))
    return [verdict(engine, config) for engine in ENGINES]


def require(dense: Any, partition: Partition) -> None:
    """Raise ValueError if an engine of `partition.engines` cannot load the result, with what to change.

    Args:
        dense: config object of the parent.
    """
    config = _largest(exporters.choose(dense, partition).config(dense, partition))
    if refused := [each for each in (verdict(e, config) for e in partition.engines) if each.refused]:
        lines = [f"engines: {each.engine} cannot run the {config.model_type}: {each.refused}" for each in refused]
        raise ValueError("\n  ".join([*lines, _way_out(dense, partition, config)]))


def warnings(dense: Any, partition: Partition) -> list[str]:
    """What engines of `partition.engines` will run slowly, a line each, and the nearest shapes that they do not."""
    config = _largest(exporters.choose(dense, partition).config(dense, partition))
    slow = [each for each in (verdict(e, config) for e in partition.engines) if each.slow]
    lines = [f"{each.engine} will be slow: {each.slow}" for each in slow]
    if slow and (better := nearest(dense, partition, fast=True)):
        lines.append(f"nearest shapes that none of {', '.join(partition.engines)} runs slowly: {_listed(better)}")
    return lines


def _largest(config: Any) -> Any:
    """The config with the largest top_k that it must serve."""
    config.num_experts_per_tok = max([config.num_experts_per_tok, *architectures.elastic(config)])
    return config


def nearest(dense: Any, partition: Partition, *, fast: bool = False) -> list[Partition]:
    """Shapes at the same active share of the FFN that all engines load, those of the most similar width first.

    Those that an engine runs slowly come last, or with `fast` not at all.
    """
    if partition.elastic:  # its values of top_k go with this number of experts
        return []
    width = partition.check_width(dense.intermediate_size)
    for candidates in (list(_scaled(dense, partition)), list(_unshared(dense, partition))):
        configs = _configs(dense, candidates[0]) if candidates else {}
        ranked: dict[int, tuple[tuple[float, ...], Partition]] = {}
        for each in candidates:
            slow = _slowest(configs, each, dense=dense)
            if slow is None or (fast and slow):
                continue
            size = each.check_width(dense.intermediate_size)
            shared = _share(each.shared_experts, each) - _share(partition.shared_experts, partition)
            rank = (slow, abs(math.log2(size / width)), abs(shared))
            if size not in ranked or rank < ranked[size][0]:
                ranked[size] = (rank, each)
        if ranked:
            return [each for _, each in sorted(ranked.values(), key=lambda pair: pair[0])[:SHOWN]]
    return []


def _configs(dense: Any, partition: Partition) -> dict[str, Any]:
    """Configs of the result in every class that can express it and that the target allows."""
    wanted = exporters.EXPORTERS if partition.target == "auto" else [partition.target]
    able = {kind: exporters.EXPORTERS[kind] for kind in wanted}
    return {
        kind: exporter.config(dense, partition)
        for kind, exporter in able.items()
        if exporter.supports(dense, partition) is None
    }


def _slowest(configs: dict[str, Any], partition: Partition, *, dense: Any) -> int | None:
    """The number of engines that run a shape slowly in the first class that all load; None if there is no such class.

    Args:
        configs: of another shape, by class.
    """
    for kind, config in configs.items():
        row, size = architectures.SPARSE[kind], partition.check_width(dense.intermediate_size)
        shaped = copy.copy(config)
        setattr(shaped, row.experts, partition.experts)
        setattr(shaped, row.expert_size, size)
        shaped.num_experts_per_tok = partition.top_k
        if row.shared_size and partition.shared_experts:
            setattr(shaped, row.shared_size, partition.shared_experts * size)
        if not any(limits.check(engine, shaped) for engine in partition.engines):
            return sum(bool(limits.slow(engine, shaped)) for engine in partition.engines)
    return None


def _share(part: int, partition: Partition) -> float:
    return part / (partition.experts + partition.shared_experts)


def _scaled(dense: Any, partition: Partition) -> Iterator[Partition]:
    """Other numbers of experts, shared among them, with as many neurons in all and active."""
    routed, shared, chosen = partition.experts, partition.shared_experts, partition.top_k
    size = partition.check_width(dense.intermediate_size)
    if partition.method == "token_clusters":  # a token passes one routed expert, whatever its size
        active = (shared + 1) * size
        for s in range(1, active) if shared else []:
            if s != shared and active % (s + 1) == 0:
                yield _with(partition, shared_experts=s, expert_size=active // (s + 1))
        return
    if partition.may_overlap:
        for factor in range(2, routed + 1):
            if routed % factor == chosen % factor == 0:
                each = _with(partition, experts=routed // factor, top_k=chosen // factor, expert_size=size * factor)
                with contextlib.suppress(ValueError):
                    each.check_width(dense.intermediate_size)
                    yield each
        return
    for total in range(2, min(dense.intermediate_size, 1024) + 1):
        exact = (shared + chosen) * total / (shared + routed)
        if dense.intermediate_size % total or exact != int(exact):
            continue
        active = int(exact)
        usual = shared * total / (shared + routed)
        for s in range(math.ceil(usual / 2), int(usual * 1.5) + 1) if shared else [0]:
            if bool(s) == bool(shared) and s < active and (s, total) != (shared, shared + routed):
                yield _with(partition, experts=total - s, shared_experts=s, top_k=active - s)


def _unshared(dense: Any, partition: Partition) -> Iterator[Partition]:
    """The same without shared experts, where an engine has trouble with those."""
    if partition.shared_experts and partition.method == "activation":
        routed = partition.experts + partition.shared_experts
        bare = _with(partition, experts=routed, shared_experts=0, top_k=partition.top_k + partition.shared_experts)
        yield bare
        yield from _scaled(dense, bare)


def _with(partition: Partition, **fields: int) -> Partition:
    return partition.model_copy(update=fields)


def _listed(found: list[Partition]) -> str:
    return "; ".join(
        f"experts: {each.experts}, shared_experts: {each.shared_experts}, top_k: {each.top_k}"
        + (f", expert_size: {each.expert_size}" if each.expert_size else "")
        for each in found
    )


def _way_out(dense: Any, partition: Partition, config: Any) -> str:
    """Which settings can be changed, each with values that work."""
    ways = []
    if found := nearest(dense, partition):
        share = partition.active(dense.intermediate_size)
        ways.append(f"take one of the nearest shapes that they load, {share:.0%} of the FFN active: {_listed(found)}")
    seen: list[list[Engine]] = [[]]
    classes = _configs(dense, partition.model_copy(update={"target": "auto"}))
    for kind in sorted(classes, key=lambda kind: kind != config.model_type):
        names = [engine for engine in partition.engines if not limits.check(engine, classes[kind])]
        if names not in seen:
            seen.append(names)
            changes = [f"engines: [{', '.join(names)}]"] * (names != partition.engines)
            changes += [f"target: {kind}"] * (kind != config.model_type)
            ways.append(f"set {', '.join(changes)}")
    return f"change `partition`: {'; or '.join(ways)}" if ways else "take it out of `engines`"

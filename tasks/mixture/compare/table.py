"""The figures of a comparison: means over seeds, standard errors, and who is better, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Losses = Mapping[int, float]
"""{seed: loss}."""
TEXTS = {"heldout": "held-out", "unseen": "unseen", "target": "target"}
"""What a result has losses on, and how a table calls it."""


def mean(losses: Mapping[str, float]) -> float:
    """Over the domains, which all count alike."""
    return statistics.fmean(losses.values())


def figure(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error of the mean (NaN of one value) and number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "stderr": error, "n": len(values)}


def difference(one: Losses, other: Losses) -> dict[str, float]:
    """`one` - `other`, paired by seed: both began with the same weights."""
    return figure([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def verdict(found: Mapping[str, float], *, other: str) -> str:
    """Who is better by more than two standard errors."""
    if math.isnan(found["stderr"]):
        return "one seed says nothing"
    if abs(found["mean"]) <= 2 * found["stderr"]:
        return f"no better, no worse than {other}"
    return f"better than {other}" if found["mean"] < 0 else f"worse than {other}"


def row(method: str, results: Mapping[int, Any], against: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Figures of a method's cells {seed: result}, and its difference to each baseline {name: {seed: result}}.

    A negative difference is a lower loss than the baseline's.
    """
    made: dict[str, Any] = {"method": method, "seeds": sorted(results)}
    for what in TEXTS:
        own = _by_seed(results, what)
        if not own:
            continue
        made[what] = figure(list(own.values()))
        made[what]["against"] = {}
        for name, cells in against.items():
            found = difference(own, _by_seed(cells, what))
            made[what]["against"][name] = {**found, "verdict": verdict(found, other=name)}
    made["domains"] = {
        domain: statistics.fmean(result[what][domain] for result in results.values())
        for what in ("heldout", "unseen")
        for domain in next(iter(results.values()))[what]
    }
    made["tokens"] = max(result["tokens"] for result in results.values())
    made["weights"] = _spread(results)
    return made


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of a comparison, as compare.json has it."""
    seeds, unseen = content["seeds"], content["unseen"]
    seeds_said = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    lines = [
        f"{content['what'][0].upper()}{content['what'][1:]}, {seeds_said}, {content['windows']} test windows a domain."
    ]
    target = f"; target: {content['target']}" if content["target"] else ""
    lines += [f"Loss in nats per token, the mean of the domains; unseen: {', '.join(unseen) or 'none'}{target}.", ""]
    lines += [f"At equal tokens ({content['tokens']:,}):", "", *_table(content["equal_tokens"])]
    if content["equal_cost"]:
        lines += ["", "At equal total cost: baselines train on as many tokens more as the estimate cost:", ""]
        lines += _cost_table(content["equal_cost"])
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = {what: name for what, name in TEXTS.items() if any(what in made for made in rows)}
    head = ["method", *(cell for name in texts.values() for cell in (name, "- uniform"))]
    head += [f"on {name} text" for name in texts.values()]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|---:|' * len(texts)}{'---|' * len(texts)}"]
    for made in rows:
        cells = [made["method"]]
        for what in texts:
            found = made[what]
            cells += [_shown(found), _shown(found["against"].get("uniform"), sign="+")]
        cells += [_said(made[what], "uniform") for what in texts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cost_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    baselines = list(dict.fromkeys(name for made in rows for name in made["heldout"]["against"]))
    head = ["method", "its cost, tokens", "baselines train on", "text", "loss", *(f"- {name}" for name in baselines)]
    lines = [f"| {' | '.join(head)} | |"]
    lines += [f"|---|---:|---:|---|---:|{'---:|' * len(baselines)}---|"]
    for made in rows:
        for what, name in TEXTS.items():
            if what not in made:
                continue
            against = made[what]["against"]
            said = "; ".join(_said(made[what], other) for other in against)
            differences = [_shown(against[other], sign="+") for other in baselines]
            cells = [made["method"], f"{made['cost']:,.0f}", f"{made['baseline_tokens']:,}", name, _shown(made[what])]
            lines.append(f"| {' | '.join([*cells, *differences, said])} |")
    return lines


def _shown(found: Mapping[str, Any] | None, *, sign: str = "") -> str:
    return f"{found['mean']:{sign}.4f} ± {found['stderr']:.4f}" if found else "–"


def _said(found: Mapping[str, Any], other: str) -> str:
    return found["against"][other]["verdict"] if other in found["against"] else "–"


def _by_seed(results: Mapping[int, Any], what: str) -> dict[int, float]:
    return {seed: mean(result[what]) for seed, result in results.items() if result.get(what)}


def _spread(results: Mapping[int, Any]) -> dict[str, dict[str, float]]:
    """{domain: mean and range over the seeds of the share at the end}."""
    shares = [result["final_weights"] for result in results.values()]
    return {
        domain: {
            "mean": statistics.fmean(each[domain] for each in shares),
            "least": min(each[domain] for each in shares),
            "most": max(each[domain] for each in shares),
        }
        for domain in shares[0]
    }

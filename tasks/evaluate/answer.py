"""What page and card say first: who is better at equal active size, by how much, and at which speed.

A difference within two standard errors is nobody's. Imports nothing heavy.
"""

from __future__ import annotations

import math
from typing import Any

from tasks.evaluate import summary, unseen_table, wording
from tasks.evaluate.downstream import task_table
from tasks.evaluate.speeds import speed_table

OURS, PARENT, CHILD, PARENT_TRAINED = "trained", "dense", "child", "dense_trained"


def sentences(evaluation: dict[str, Any]) -> list[str]:
    """Quality, speed, quality on unseen text, size and tasks of the trained model beside its rival.

    The rival is the dense child, or the dense parent where there is no child. What is not known has no sentence.
    """
    parts = (quality, speed, unseen, size, tasks)
    return [text for part in parts if (text := part(evaluation))]


def quality(evaluation: dict[str, Any]) -> str:
    """Who has the lower loss, by how much, ± what."""
    if CHILD in evaluation:
        return summary.rival(evaluation)
    ours, parent = (summary.count(evaluation[key]["parameters"]["active"]) for key in (OURS, PARENT))
    delta = evaluation.get("difference", {}).get("trained_dense")
    if delta is None:
        return ""
    verdict = wording.verdict(delta, rival="dense parent")
    return (
        "There is no dense model of the same active size to compare with (`control: pruned` makes one). Against "
        f"the dense parent, with {parent} active parameters where it has {ours}, {verdict}: mean loss "
        f"{wording.signed(delta)} nats/token, paired by window."
    )


def unseen(evaluation: dict[str, Any]) -> str:
    """The same on the domains that no stage has read; "" without such."""
    rival, name = _rival(evaluation)
    delta = evaluation.get("difference", {}).get("unseen", {}).get(f"{OURS}_{rival}")
    if delta is None:
        return ""
    return (
        f"On text of domains that no stage has read ({', '.join(unseen_table.domains(evaluation))}), "
        f"{wording.verdict(delta, rival=name)}: mean loss {wording.signed(delta)} nats/token compared with the {name}."
    )


def speed(evaluation: dict[str, Any]) -> str:
    """Decode and prompt speed in the best engine, as multiples of the parent's and the child's; "" if not measured."""
    if (row := speed_table.headline(evaluation.get("speed", {}))) is None:
        return ""
    ours, child = row["models"][OURS], row["models"].get(CHILD, {})
    texts = []
    for what, verb in (("decode", "decodes at"), ("prompt", "reads a prompt at")):
        ratio = ours["ratio"][what]
        text = f"{verb} {ours[what]['median']:,.0f} tokens/s, {ratio['median']:.2f} × the parent's speed "
        text += f"({ratio['min']:.2f} to {ratio['max']:.2f} by repeat)"
        if "ratio" in child:
            text += f" and {ratio['median'] / child['ratio'][what]['median']:.2f} × the child's"
        texts.append(text)
    return f"In {speed_table.title(row)}, it {', and '.join(texts)}."


def size(evaluation: dict[str, Any]) -> str:
    """What it costs in memory beside its rival."""
    rival, name = _rival(evaluation)
    total, other = (evaluation[key]["parameters"]["total"] for key in (OURS, rival))
    return f"It has {summary.count(total)} parameters in all, {total / other:.2f} × the {name}'s."


def tasks(evaluation: dict[str, Any]) -> str:
    """In which tasks it differs from its rival on the same items, and where its score may be a guess.

    A task speaks by acc_norm, else acc, else its first metric that is a mean over items; "" without such tasks.
    """
    rival, name = _rival(evaluation)
    by_task: dict[str, dict[str, dict[str, float]]] = {}
    for task, metric, by_pair in task_table.differences(evaluation):
        if f"{OURS}_{rival}" in by_pair and task in evaluation[OURS]["tasks"]:
            by_task.setdefault(task, {})[metric] = by_pair[f"{OURS}_{rival}"]
    if not by_task:
        return ""
    better: list[str] = []
    worse: list[str] = []
    guesses = []
    for task, by_metric in by_task.items():
        metric = next((each for each in ("acc_norm", "acc") if each in by_metric), next(iter(by_metric)))
        found, entry = by_metric[metric], evaluation[OURS]["tasks"][task]
        if not found["low"] <= 0 <= found["high"]:
            (better if found["low"] > 0 else worse).append(task)
        guess = entry.get("chance") if metric.startswith("acc") else None
        if guess is not None and abs(entry[metric] - guess) <= 2 * math.sqrt(guess * (1 - guess) / entry["n"]):
            guesses.append(task)
    told = [f"{what} in {', '.join(names)}" for what, names in (("better", better), ("worse", worse)) if names]
    verdict = f"it is {' and '.join(told)}" if told else "none separates the two"
    text = (
        f"Of {len(by_task)} downstream task{'s'[: len(by_task) > 1]}, against the {name} on the same items and by "
        f"intervals of {evaluation['paired']['level']:.0%}, "
        f"{verdict}."
    )
    return f"{text} Its score may be a guess in {', '.join(guesses)}." if guesses else text


def table(evaluation: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The few figures beside each other: titles of the columns, and rows (label, a cell for each)."""
    titles = dict(zip(summary.models(evaluation), summary.titles(evaluation), strict=True))
    shown = [key for key in (OURS, CHILD, PARENT, PARENT_TRAINED) if key in evaluation]
    models = [evaluation[key] for key in shown]
    rows = [
        ("perplexity on test text", [f"{model['perplexity']['mean']:.2f}" for model in models]),
        ("bits per byte", [f"{model['bits_per_byte']['mean']:.3f}" for model in models]),
        (
            "active / all parameters",
            [" / ".join(summary.count(model["parameters"][key]) for key in ("active", "total")) for model in models],
        ),
        ("forward FLOPs per token", [summary.count(model["flops_per_token"]) for model in models]),
    ]
    if row := speed_table.headline(evaluation.get("speed", {})):
        where = speed_table.title(row)
        rows += [(f"{label}: {where}", cells) for label, cells in speed_table.cells(row, shown)]
    return [titles[key] for key in shown], rows


def _rival(evaluation: dict[str, Any]) -> tuple[str, str]:
    return (CHILD, "dense child") if CHILD in evaluation else (PARENT, "dense parent")

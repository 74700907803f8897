"""The result of a pipeline as one table, from runs/PIPELINE/evaluation.json alone; imports nothing heavy.

python -m tasks.evaluate.summary PIPELINE
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluate import unseen_table
from tasks.evaluate.downstream import task_table
from tasks.evaluate.speeds import speed_table
from tasks.evaluate.wording import signed, verdict

if TYPE_CHECKING:
    from rich.table import Table

MODELS = ("dense", "split", "trained", "child", "dense_trained")
"""Keys of evaluation.json, in the order of the columns; the last two are there in pipelines with `control`."""
EQUAL = 0.02
"""The relative difference up to which two models are of equal size."""


def read(pipeline: str) -> dict[str, Any]:
    """The content of runs/PIPELINE/evaluation.json. Raises FileNotFoundError saying how to get it."""
    path = _path(pipeline)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `moeforge run {pipeline}` writes it")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _path(pipeline: str) -> Path:
    return Path("runs") / pipeline / "evaluation.json"


def models(evaluation: dict[str, Any]) -> list[str]:
    """The keys of the models that were judged, in the order of the columns."""
    return [key for key in MODELS if key in evaluation]


def titles(evaluation: dict[str, Any]) -> list[str]:
    """The table's columns, one per model."""
    known = (
        "dense parent",
        f"after {conversion(evaluation)}",
        "after training",
        "dense child",
        "parent trained alike",
    )
    named = dict(zip(MODELS, known, strict=True))
    return [named[key] for key in models(evaluation)]


def conversion(evaluation: dict[str, Any]) -> str:
    """What made the experts, in words: `copying`, or `the split` for all other methods."""
    return "copying" if evaluation.get("method") == "copy" else "the split"


def rows(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The table's rows: (label with unit, a value per model)."""
    judged = [evaluation[key] for key in models(evaluation)]
    domains = list(evaluation["test"]["domains"])
    table: list[tuple[str, list[str]]] = []

    def add(label: str, values: list[str]) -> None:
        table.append((label, values))

    for metric, label, digits in (("bits_per_byte", "bits/byte", 3), ("loss", "loss, nats/token", 3)):
        for domain in [*domains, "mean"]:
            add(f"{label}: {domain}", [f"{model[metric][domain]:.{digits}f}" for model in judged])
    add("perplexity: mean", [f"{model['perplexity']['mean']:.2f}" for model in judged])
    table += unseen_table.rows(evaluation, models(evaluation))
    table += task_table.rows(evaluation, models(evaluation))
    for top_k, at in evaluation["trained"].get("elastic", {}).items():
        cells = [model.get("elastic", {}).get(top_k) for model in judged]
        label = f"perplexity: mean, top_k {top_k} ({count(at['active'])} active)"
        add(label, [f"{cell['perplexity']['mean']:.2f}" if cell else "–" for cell in cells])
    for key in ("total", "active"):
        add(f"parameters: {key}", [count(model["parameters"][key]) for model in judged])
    add("forward FLOPs per token", [count(model["flops_per_token"]) for model in judged])
    return table + speeds(evaluation)


def speeds(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of speed, prompt and decode, for each engine."""
    measured, columns = evaluation.get("speed", {}), models(evaluation)
    return speed_table.rows(measured, columns) + speed_table.by_top_k(measured, columns)


def table(pipeline: str) -> Table:
    """`rows` of a finished pipeline for the terminal, with `notes` as caption.

    Raises:
        FileNotFoundError: as `read`.
        ValueError: evaluation.json is not JSON, or lacks a key; the message names the file, the key and the fix.
    """
    from rich.table import Table

    try:
        evaluation = read(pipeline)
        caption, columns, body = notes(evaluation), titles(evaluation), rows(evaluation)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{_path(pipeline)} is not JSON ({error}); `moeforge run {pipeline}` writes it anew"
        ) from error
    except KeyError as error:
        raise ValueError(
            f"{_path(pipeline)} lacks the key {error}; another version wrote it: remove it, and `moeforge run "
            f"{pipeline}` writes it anew"
        ) from error
    result = Table(title=pipeline, caption="\n".join(caption), caption_justify="left")
    result.add_column("")
    for title in columns:
        result.add_column(title, justify="right", no_wrap=True)
    for label, values in body:
        result.add_row(label, *values, end_section=label.endswith(": mean"))
    return result


def notes(evaluation: dict[str, Any]) -> list[str]:
    """One line each on the data, the change in loss, the dense child, unseen text, tasks, speed, routing, a warning
    first; none if not known."""
    parts = (basis, change, rival, unseen_table.sentence, tasks, speed_basis, routing)
    lines = [part(evaluation) for part in parts]
    if collapsed(evaluation):
        lines.insert(0, lines.pop())
    return [line for line in lines if line]


def basis(evaluation: dict[str, Any]) -> str:
    """The number of windows, tokens and bytes that were evaluated."""
    domains = evaluation["test"]["domains"].values()
    sums = {key: sum(domain[key] for domain in domains) for key in ("windows", "tokens", "bytes")}
    return (
        f"Evaluated in float32 on {sums['windows']} test windows of {evaluation['test']['seq_len']} tokens "
        f"({sums['tokens']:,} predicted tokens, {sums['bytes']:,} bytes). The mean gives each domain the same weight."
    )


def change(evaluation: dict[str, Any]) -> str:
    """The trained model's mean loss minus those of the other two, with paired standard errors, and the recovery."""
    differences = evaluation.get("difference", {})
    others = (("dense", "the dense parent"), ("split", f"the model after {conversion(evaluation)}"))
    parts = [
        f"{signed(differences[f'trained_{key}'])} compared with {title}"
        for key, title in others
        if f"trained_{key}" in differences
    ]
    if not parts:
        return ""
    text = f"Mean loss after training, in nats/token and paired by window: {', '.join(parts)}."
    if "recovery" in evaluation:
        text += f" Training recovered {evaluation['recovery']:.0%} of the loss that {conversion(evaluation)} added."
    return text


def rival(evaluation: dict[str, Any]) -> str:
    """Who is better, the trained model or the dense child, at which active parameters; "" without one.

    They count as equal within 2 %: a child may have any shape.
    """
    delta = evaluation.get("difference", {}).get("trained_child")
    if delta is None:
        return ""
    ours, child = (evaluation[key]["parameters"]["active"] for key in ("trained", "child"))
    if math.isclose(ours, child, rel_tol=EQUAL):
        sizes = f"At equal active parameters ({count(ours)}, dense child {count(child)})"
    else:
        sizes = f"With {count(ours)} active parameters, {ours / child:.2f} × the dense child's {count(child)},"
    return (
        f"{sizes} and after the same training, "
        f"{verdict(delta, rival='dense child')}: mean loss {signed(delta)} nats/token compared with the dense child, "
        "paired by window."
    )


def tasks(evaluation: dict[str, Any]) -> str:
    """What is to be known of the scores of tasks; see `task_table.notes`."""
    return task_table.notes(evaluation, dict(zip(models(evaluation), titles(evaluation), strict=True)))


def speed_basis(evaluation: dict[str, Any]) -> str:
    """The conditions under which the speeds were measured."""
    named = dict(zip(models(evaluation), titles(evaluation), strict=True))
    return speed_table.basis(evaluation.get("speed", {}), machine=evaluation.get("machine", {}), titles=named)


def collapsed(evaluation: dict[str, Any]) -> bool:
    """True if the trained model has layers whose routing counts as collapsed."""
    return bool(evaluation.get("routing", {}).get("trained", {}).get("collapsed"))


def routing(evaluation: dict[str, Any]) -> str:
    """The trained model's most uneven layer, and a warning if layers count as collapsed."""
    trained = evaluation.get("routing", {}).get("trained")
    if not trained or "worst" not in trained:
        return ""
    experts, top_k, worst = evaluation["routing"]["experts"], evaluation["routing"]["top_k"], trained["worst"]
    text = (
        f"Most uneven routing: layer {worst['layer']}, where {top_k} of {experts} experts take {worst['busiest']:.0%} "
        f"of the load (if even, {trained['even']:.0%}; if always the same {top_k}, 100%) and {worst['unused']} get no "
        "token."
    )
    if collapsed(evaluation):
        text = (
            f"Warning: collapsed routing in {trained['collapsed']} of {len(trained['layers']['layer'])} sparse layers "
            f"(limit: {trained['limit']:.0%} of the load on the {top_k} busiest). {text}"
        )
    return text


def count(value: float) -> str:
    """134515008 is 134.5 M."""
    size, prefix = unit(value)
    return f"{value / size:.1f} {prefix}" if prefix else f"{value:.0f}"


def unit(value: float) -> tuple[float, str]:
    """The largest unit that a value is not below, and its prefix: (1e6, "M")."""
    units = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((size, prefix) for size, prefix in units if value >= size), (1.0, ""))


def main() -> int:
    """Print the table of the pipeline named on the command line."""
    from rich.console import Console

    if len(sys.argv) != 2:
        print("usage: python -m tasks.evaluate.summary PIPELINE", file=sys.stderr)
        return 2
    try:
        Console().print(table(sys.argv[1]))
    except (FileNotFoundError, ValueError) as error:
        print(f"summary: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

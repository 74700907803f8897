"""The result of a pipeline as one table, from runs/PIPELINE/evaluation.json alone; imports nothing heavy.

python -m tasks.evaluate.summary PIPELINE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MODELS = {"dense": "dense parent", "split": "after the split", "trained": "after training"}


def read(pipeline: str) -> dict[str, Any]:
    """The content of runs/PIPELINE/evaluation.json. Raises FileNotFoundError saying how to get it."""
    path = Path("runs") / pipeline / "evaluation.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there yet; `moeforge run {pipeline}` writes it")
    return json.loads(path.read_text())


def rows(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The table's rows: (what with its unit, [dense parent, after the split, after training])."""
    models = [evaluation[key] for key in MODELS]
    domains = list(evaluation["test"]["domains"])
    table: list[tuple[str, list[str]]] = []

    def add(label: str, values: list[str]) -> None:
        table.append((label, values))

    for metric, label, digits in (("bits_per_byte", "bits/byte", 3), ("loss", "loss, nats/token", 3)):
        for domain in [*domains, "mean"]:
            add(f"{label}: {domain}", [f"{model[metric][domain]:.{digits}f}" for model in models])
    add("perplexity: mean", [f"{model['perplexity']['mean']:.2f}" for model in models])
    for task, first in models[0]["tasks"].items():
        for metric in [key for key in first if f"{key}_stderr" in first]:
            entries = [model["tasks"][task] for model in models]
            label = f"{task} {metric} (n = {first['n']}, {first['num_fewshot']}-shot)"
            add(label, [f"{entry[metric]:.3f} ± {entry[f'{metric}_stderr']:.3f}" for entry in entries])
    for key in ("total", "active"):
        add(f"parameters: {key}", [count(model["parameters"][key]) for model in models])
    add("forward FLOPs per token", [count(model["flops_per_token"]) for model in models])
    add("tokens/s, forward", [f"{model['tokens_per_second']:,.0f}" for model in models])
    return table


def table(pipeline: str) -> Table:
    """`rows` of a finished pipeline for the terminal, with what the figures rest on as caption."""
    from rich.table import Table

    evaluation = read(pipeline)
    result = Table(title=pipeline, caption=basis(evaluation), caption_justify="left")
    result.add_column("")
    for title in MODELS.values():
        result.add_column(title, justify="right", no_wrap=True)
    for label, values in rows(evaluation):
        result.add_row(label, *values, end_section=label.endswith(": mean"))
    return result


def basis(evaluation: dict[str, Any]) -> str:
    """One sentence: how many windows, tokens and bytes the figures rest on, and what training won back."""
    domains = evaluation["test"]["domains"].values()
    sums = {key: sum(domain[key] for domain in domains) for key in ("windows", "tokens", "bytes")}
    text = (
        f"{sums['windows']} test windows of {evaluation['test']['seq_len']} tokens: {sums['tokens']:,} tokens "
        f"predicted, {sums['bytes']:,} bytes, float32; mean: over domains, each counting the same."
    )
    if "recovery" in evaluation:
        text += f" Training won back {evaluation['recovery']:.0%} of the loss that the split cost."
    return text


def count(value: float) -> str:
    """134515008 is 134.5 M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f}"


def main() -> int:
    """Print the table of the pipeline named on the command line."""
    from rich.console import Console

    if len(sys.argv) != 2:
        print("usage: python -m tasks.evaluate.summary PIPELINE", file=sys.stderr)
        return 2
    try:
        Console().print(table(sys.argv[1]))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

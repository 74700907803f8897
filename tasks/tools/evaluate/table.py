"""The result as rows and sentences, for the terminal and the page; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluate import summary
from tasks.evaluate.downstream import task_table
from tasks.evaluate.wording import signed

if TYPE_CHECKING:
    from rich.table import Table

Result = dict[str, Any]
METRICS = (("bits_per_byte", "bits/byte", 3), ("loss", "loss, nats/token", 3), ("perplexity", "perplexity", 2))


def titles(result: Result) -> list[str]:
    """A column for each checkpoint: the folder's name, with that of its run, or its path where names are the same."""
    paths = [model["path"] for model in result["models"]]
    names = [_name(Path(path).resolve()) for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _name(path: Path) -> str:
    """demo/trained of …/runs/demo/trained; of others the last part."""
    for folder in path.parents:
        if folder.name == "runs":
            return str(path.relative_to(folder))
    return path.name


def groups(result: Result) -> list[dict[str, Any]]:
    """Groups of rows: {title, basis, rows: [(label, a value per checkpoint)]}, as the page's table takes them."""
    return [*text(result), *others(result)]


def text(result: Result) -> list[dict[str, Any]]:
    """The groups of figures on the text."""
    models, found = result["models"], []
    for where, suffix in (("domains", ""), ("unseen", ", unseen text")):
        if where not in result["text"]:
            continue
        there = [model["unseen"] if where == "unseen" else model for model in models]
        for metric, title, digits in METRICS:
            if metric in there[0]:
                rows = [
                    (row, [f"{model[metric][row]:.{digits}f}" for model in there])
                    for row in [*result["text"][where], "mean"]
                ]
                found.append({"title": title + suffix, "basis": "", "rows": rows})
    return found


def others(result: Result) -> list[dict[str, Any]]:
    """The groups of tasks and sizes."""
    models = result["models"]
    sizes = {"title": "size", "basis": "", "rows": _sizes(models)}
    return [*task_table.groups([model["tasks"] for model in models]), sizes]


def _sizes(models: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    def known(values: list[float | None]) -> list[str]:
        return ["not known" if value is None else summary.count(value) for value in values]

    return [
        ("parameters, total", known([model["parameters"]["total"] for model in models])),
        ("parameters, active", known([model["parameters"].get("active") for model in models])),
        ("forward FLOPs per token", known([model.get("flops_per_token") for model in models])),
    ]


def differences(result: Result) -> dict[str, Any] | None:
    """The scores of the first checkpoint less those of each other: {columns, groups of rows}; None without any."""
    others, columns = result["difference"], titles(result)
    rows = [
        (f"{task} {metric}", [task_table.interval(other["tasks"][task][metric]) for other in others])
        for task, by_metric in (others[0]["tasks"] if others else {}).items()
        for metric in by_metric
    ]
    level = f"{result['paired']['level']:.0%}"
    basis = f"on the same items, {level} interval of the bootstrap; undecided: 0 is in it"
    group = {"title": columns[0], "basis": basis, "rows": rows}
    return {"columns": [f"less {title}" for title in columns[1:]], "groups": [group]} if rows else None


def notes(result: Result) -> list[str]:
    """Sentences on the text, on how the checkpoints can be compared, on differences, and on routing."""
    basis, columns = result["text"], titles(result)
    every = [entry for where in ("domains", "unseen") for entry in basis.get(where, {}).values()]
    windows, size = (sum(entry[key] for entry in every) for key in ("windows", "bytes"))
    lines = [
        f"Judged in {basis['dtype']} on {windows} windows of {basis['seq_len']} tokens ({size:,} bytes): "
        f"{basis['source']}. The mean gives each domain the same weight."
    ]
    if basis["by"] == "text":
        lines.append(
            "Not all of these checkpoints have the tokenizer of the windows. So each was given the windows' text, "
            "document by document, in its own tokens, and they are compared by bits per byte alone: losses per token "
            "would be of other tokens. These figures are not those of an evaluation by token ids, where a window runs "
            "over documents."
        )
    for title, model in zip(columns, result["models"], strict=True):
        if model.get("changed"):
            lines.append(
                f"The tokenizer of {title} does not give back {model['changed']} of the texts as they were; where it "
                "drops characters, its bits per byte are too few."
            )
    for entry, title in zip(result["difference"], columns[1:], strict=True):
        parts = [signed(entry["domains"])]
        parts += [f"{signed(entry['unseen'])} on unseen text"] if "unseen" in entry else []
        metric = "Mean loss in nats/token" if entry["unit"] == "nats/token" else "Mean bits per byte"
        lines.append(f"{metric} of {columns[0]} compared with {title}, paired by window: {', '.join(parts)}.")
    for title, model in zip(columns, result["models"], strict=True):
        if found := model.get("routing"):
            lines.append(f"{title}: {routing(found)}")
    return [*lines, left] if (left := task_table.missing(result)) else lines


def routing(found: dict[str, Any]) -> str:
    """The most uneven layer, and a warning if layers count as collapsed, in the words of a pipeline's report."""
    basis = {"experts": found["experts"], "top_k": found["top_k"], "trained": found["balance"]}
    return summary.routing({"routing": basis})


def on_items(result: Result) -> list[str]:
    """The differences of scores in words: a line for each other checkpoint."""
    columns, level = titles(result), f"{result['paired']['level']:.0%}"
    return [
        f"Scores of {columns[0]} compared with {title}, paired by item, with intervals of {level} (bootstrap): "
        + "; ".join(
            f"{task} {metric} {task_table.interval(found)}"
            for task, by_metric in entry["tasks"].items()
            for metric, found in by_metric.items()
        )
        + "."
        for entry, title in zip(result["difference"], columns[1:], strict=True)
        if entry["tasks"]
    ]


def table(result: Result) -> Table:
    """Rows and notes for the terminal."""
    from rich.table import Table

    caption = "\n".join([*notes(result), *on_items(result)])
    shown = Table(title=result["models"][0]["path"], caption=caption, caption_justify="left")
    shown.add_column("")
    for title in titles(result):
        shown.add_column(title, justify="right", overflow="fold")
    for group in groups(result):
        for i, (label, values) in enumerate(group["rows"]):
            last = i == len(group["rows"]) - 1
            basis = f" ({group['basis']})" if group["basis"] else ""
            shown.add_row(f"{group['title']}: {label}{basis}", *values, end_section=last)
    return shown

"""Fills the report page, report.html.j2, from the results of a pipeline."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from tasks.evaluate import details, summary, unseen_table
from tasks.evaluate.report import (
    answer_section,
    card,
    charts,
    corpus_section,
    cost_section,
    elastic_section,
    experts_section,
    frontier_section,
    mixture_section,
    tasks_section,
    training_section,
)
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Section
from tasks.evaluate.speeds import speed_table
from tasks.pretrain.job import code_version
from tasks.settings import Task, suites

if TYPE_CHECKING:
    from jinja2 import Environment

FIRST = (answer_section, frontier_section)
"""What the page begins with. Each module has `section(results)`, which gives a section.Section or None."""
MORE = (tasks_section, elastic_section, cost_section, mixture_section)
"""The same, for what comes after quality and speed."""
PACKAGES = ("torch", "transformers", "deepspeed", "lm-eval", "datasets", "tokenizers", "numpy", "pyarrow", "moeforge")
PARTS = {
    "style": "style.css.j2",
    "tables": "table.html.j2",
    "heat_map": "heat_map.html.j2",
    "section_of": "section.html.j2",
}
"""What the page shares with others. Templates include them by these variables, so that code knows what it reads."""


def render(results: Results) -> str:
    """The whole page as HTML; it loads nothing from anywhere."""
    return environment().get_template("report.html.j2").render(context(results))


def environment(*packages: str) -> Environment:
    """What renders the templates of this folder, and before them those of `packages`. All text is escaped."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "tasks.evaluate.report")])
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.filters["code"] = code
    return env


def code(text: str) -> Markup:
    """Markup of a text whose `backticks` mark code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def context(results: Results) -> dict[str, Any]:
    """The template's variables. Charts are markup, everything else is text that the template escapes."""
    evaluation = results.evaluation
    domains, unseen = list(evaluation["test"]["domains"]), unseen_table.domains(evaluation)
    titles = summary.titles(evaluation)
    columns = list(zip(summary.models(evaluation), titles, strict=True))
    bits = {
        row: {title: evaluation[key]["bits_per_byte"][row] for key, title in columns} for row in [*domains, "mean"]
    }
    for row in [*unseen, "mean"] if unseen else []:
        bits["unseen mean" if row == "mean" else row] = {
            title: evaluation[key]["unseen"]["bits_per_byte"][row] for key, title in columns
        }
    return {
        **PARTS,
        "pipeline": results.name,
        "model": results.pipeline.model,
        "shape": card.shape(results),
        "tiles": tiles(evaluation),
        "basis": " ".join(part(evaluation) for part in (summary.basis, summary.change, unseen_table.sentence)).strip(),
        "warning": summary.routing(evaluation) if summary.collapsed(evaluation) else "",
        "quality_chart": Markup(charts.dots(bits, label="bits per byte on test text; fewer is better")),
        "first": sections(FIRST, results),
        "more": sections(MORE, results),
        "models": titles,
        "conversion": summary.conversion(evaluation),
        "quality": quality(evaluation, domains),
        "size": size(evaluation),
        "speeds": speeds(evaluation),
        "speed_basis": summary.speed_basis(evaluation),
        "samples": [
            {
                "prompt": card.printable(entry["prompt"]),
                "texts": [(title, card.printable(text)) for title, text in entry["texts"]],
            }
            for entry in card.samples(results)
        ],
        "new_tokens": results.samples["new_tokens"],
        "repeated": card.repeated(results),
        "training": training_section.section(results),
        "experts": experts_section.section(results),
        "details": details.sections(results.details, dict(columns)),
        "corpus": corpus_section.section(results),
        "mixture": mixture(results),
        "licences": licences(results),
        "perplexity": f"{evaluation['trained']['perplexity']['mean']:.2f}",
        "snippet": card.SNIPPET,
        "times": times(results),
        "settings": list(flatten(results.pipeline.model_dump())),
        "versions": versions(results.evaluation["machine"]),
    }


def tiles(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """The headline figures."""
    dense, split, trained = (evaluation[key] for key in ("dense", "split", "trained"))
    sizes = trained["parameters"]
    ratio = [model["perplexity"]["mean"] / dense["perplexity"]["mean"] for model in (split, trained)]
    elsewhere = f"; {trained['multiple']['unseen']:.2f}× on unseen text" if "unseen" in trained else ""
    shown = [
        {
            "label": "Bits per byte after training",
            "value": f"{trained['bits_per_byte']['mean']:.3f}",
            "note": f"dense parent {dense['bits_per_byte']['mean']:.3f}, "
            f"after {summary.conversion(evaluation)} {split['bits_per_byte']['mean']:.3f}",
        },
        {
            "label": "Perplexity against the dense parent",
            "value": f"{ratio[1]:.2f}×",
            "note": f"{ratio[0]:.2f}× right after {summary.conversion(evaluation)}{elsewhere}",
        },
        {
            "label": "Active parameters",
            "value": f"{sizes['active'] / sizes['total']:.0%}",
            "note": f"{summary.count(sizes['active'])} of {summary.count(sizes['total'])}; forward FLOPs "
            f"{trained['flops_per_token'] / dense['flops_per_token']:.0%} of the dense parent's",
        },
    ]
    if row := speed_table.headline(evaluation.get("speed", {})):
        ratios = row["models"]["trained"]["ratio"]
        notes = [f"prompt {ratios['prompt']['median']:.2f}×"]
        if "ratio" in row["models"].get("child", {}):
            notes.append(f"dense child {row['models']['child']['ratio']['decode']['median']:.2f}×")
        tile = {
            "label": "Decode speed against the dense parent",
            "value": f"{ratios['decode']['median']:.2f}×",
            "note": f"{', '.join(notes)}; {speed_table.title(row)}",
        }
        shown.append(tile)
    if "recovery" in evaluation:
        share = {
            "label": "Loss recovered by training",
            "value": f"{evaluation['recovery']:.0%}",
            "note": f"of the {split['loss']['mean'] - dense['loss']['mean']:.3f} nats/token that "
            f"{summary.conversion(evaluation)} added",
        }
        shown.insert(1, share)
    return shown


def quality(evaluation: dict[str, Any], domains: list[str]) -> list[dict[str, Any]]:
    """The side-by-side table: groups of rows (label, one value per model)."""
    models = [evaluation[key] for key in summary.models(evaluation)]
    groups = [
        {
            "title": title,
            "basis": "",
            "rows": [(row, [f"{model[metric][row]:.{digits}f}" for model in models]) for row in [*domains, "mean"]],
        }
        for metric, title, digits in (
            ("bits_per_byte", "bits per byte", 3),
            ("loss", "loss, nats per token", 3),
            ("perplexity", "perplexity", 2),
        )
    ]
    return groups + unseen_table.groups(evaluation, summary.models(evaluation))


def size(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters and FLOPs in the same form."""
    models = [evaluation[key] for key in summary.models(evaluation)]
    rows = [
        (f"parameters, {key}", [summary.count(model["parameters"][key]) for model in models])
        for key in ("total", "active")
    ]
    rows.append(("forward FLOPs per token", [summary.count(model["flops_per_token"]) for model in models]))
    return [{"title": "size", "basis": "", "rows": rows}]


def speeds(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed in the same form: a group for every engine."""
    found = speed_table.groups(evaluation.get("speed", {}), summary.models(evaluation))
    return [{"title": engine, "basis": "", "rows": rows} for engine, rows in found]


def sections(modules: Sequence[Any], results: Results) -> list[Section]:
    """Those of the modules that have something to say."""
    return [made for module in modules if (made := module.section(results)) is not None]


def mixture(results: Results) -> str:
    """The method of the starting weights, and the reference losses if there are any."""
    references = results.mixture.get("evidence", {}).get("reference_losses") or {}
    text = f"Starting weights by method {results.mixture['method']}."
    if references:
        losses = ", ".join(f"{domain} {value:.3f}" for domain, value in references.items())
        text += f" Reference losses of the dense parent, nats/token: {losses}."
    return text


def licences(results: Results) -> list[dict[str, str]]:
    """Licences and sources of the model and the tasks; the corpus section has those of the domains."""
    rows = [{"what": results.pipeline.model, "license": results.model.license, "source": results.model.source}]
    rows += [
        {"what": f"task: {task.name}", "license": task.license or "as on the hub", "source": _source(task)}
        for task in suites.judged(results.pipeline.evaluate)
    ]
    return rows


def _source(task: Task) -> str:
    return ", ".join(file.source for file in task.local.values()) or "hub"


def times(results: Results) -> list[tuple[str, str]]:
    """The time of each stage, from its metrics file."""
    domains = results.corpus_metrics["domains"].values()
    seconds = {
        "corpus, sum over processes": sum(domain["seconds"] for domain in domains),
        "mixture": results.mixture_seconds,
        "partition": sum(results.partition["seconds"].values()),
        "pretrain": results.pretrain["seconds"],
        **({"control": sum(taken.values())} if (taken := results.control.get("seconds")) else {}),
        "evaluate": sum(results.evaluation[key]["seconds"] for key in summary.models(results.evaluation))
        + results.evaluation.get("speed", {}).get("seconds", 0.0),
    }
    return [(stage, duration(value)) for stage, value in seconds.items()]


def duration(seconds: float) -> str:
    """12.3 s, 4.5 minutes or 6.7 hours."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def versions(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """Interpreter, packages, code, and the machine of an evaluation."""
    rows = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed as a package"))
    rows.append(("code (git)", code_version()))
    rows.append(("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads used"))
    rows.append(("evaluated on", machine.get("gpu", machine["device"])))
    return rows


def flatten(value: dict[str, Any], prefix: str = "") -> Any:
    """Nested settings as (dotted name, text) pairs; what is not set is left out."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for i, entry in enumerate(item):
                yield from flatten(entry, f"{prefix}{key}[{i}].")
        elif item is not None and item != []:
            yield f"{prefix}{key}", ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)

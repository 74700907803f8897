"""The report page: what each figure of report.html.j2 says, from the results of a pipeline."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from markupsafe import Markup

from tasks.evaluate import card, charts, corpus, summary, training
from tasks.evaluate.results import Results
from tasks.pretrain.job import code_version

HEAT_TOP = 3.0  # times the even share at which the heat map's colour is full
PACKAGES = ("torch", "transformers", "deepspeed", "lm-eval", "datasets", "tokenizers", "numpy", "pyarrow", "moeforge")


def render(results: Results) -> str:
    """The whole page as HTML; it loads nothing from anywhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("tasks.evaluate", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return env.get_template("report.html.j2").render(context(results))


def context(results: Results) -> dict[str, Any]:
    """The template's variables. Charts are markup, everything else is text that the template escapes."""
    evaluation = results.evaluation
    domains = list(evaluation["test"]["domains"])
    titles = list(summary.MODELS.values())
    bits = {
        row: {title: evaluation[key]["bits_per_byte"][row] for key, title in summary.MODELS.items()}
        for row in [*domains, "mean"]
    }
    return {
        "pipeline": results.name,
        "model": results.pipeline.model,
        "shape": card.shape(results),
        "tiles": tiles(evaluation),
        "basis": summary.basis(evaluation),
        "difference": difference(evaluation),
        "quality_chart": Markup(charts.dots(bits, label="bits per byte on test text; fewer is better")),
        "models": titles,
        "quality": quality(evaluation, domains),
        "size": size(evaluation),
        "tasks": downstream(evaluation),
        "training": training.section(results),
        "heat_maps": heat_maps(results),
        "specialisation": specialisation(results),
        "corpus": corpus.section(results),
        "mixture": mixture(results),
        "licences": licences(results),
        "perplexity": f"{evaluation['trained']['perplexity']['mean']:.2f}",
        "snippet": card.SNIPPET,
        "settings": list(flatten(results.pipeline.model_dump())),
        "versions": versions(results),
    }


def tiles(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """The headline figures."""
    dense, split, trained = (evaluation[key] for key in summary.MODELS)
    sizes = trained["parameters"]
    ratio = [model["perplexity"]["mean"] / dense["perplexity"]["mean"] for model in (split, trained)]
    found = [
        {
            "label": "Bits per byte after training",
            "value": f"{trained['bits_per_byte']['mean']:.3f}",
            "note": f"dense parent {dense['bits_per_byte']['mean']:.3f}, "
            f"after the split {split['bits_per_byte']['mean']:.3f}",
        },
        {
            "label": "Perplexity against the dense parent",
            "value": f"{ratio[1]:.2f}×",
            "note": f"{ratio[0]:.2f}× right after the split",
        },
        {
            "label": "Parameters a token passes",
            "value": f"{sizes['active'] / sizes['total']:.0%}",
            "note": f"{summary.count(sizes['active'])} of {summary.count(sizes['total'])}; forward FLOPs "
            f"{trained['flops_per_token'] / dense['flops_per_token']:.0%} of the dense parent's",
        },
        {
            "label": "Forward speed",
            "value": f"{trained['tokens_per_second']:,.0f} tok/s",
            "note": f"{trained['tokens_per_second'] / dense['tokens_per_second']:.2f}× the dense parent's "
            f"{dense['tokens_per_second']:,.0f}, float32",
        },
    ]
    if "recovery" in evaluation:
        share = {
            "label": "Loss won back by training",
            "value": f"{evaluation['recovery']:.0%}",
            "note": f"of the {split['loss']['mean'] - dense['loss']['mean']:.3f} nats/token that the split cost",
        }
        found.insert(1, share)
    return found


def difference(evaluation: dict[str, Any]) -> str:
    """Training's effect with its paired standard error."""
    delta = evaluation["difference"]["trained_split"]
    if "stderr" not in delta:
        return ""
    change = f"{delta['loss']:+.3f}".replace("-", "−")
    return f"Training changed the mean loss by {change} ± {delta['stderr']:.3f} nats/token, paired by window."


def quality(evaluation: dict[str, Any], domains: list[str]) -> list[dict[str, Any]]:
    """The side-by-side table: groups of rows (label, one value per model)."""
    models = [evaluation[key] for key in summary.MODELS]
    return [
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


def size(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters, FLOPs and speed in the same form."""
    models = [evaluation[key] for key in summary.MODELS]
    rows = [
        (f"parameters, {key}", [summary.count(model["parameters"][key]) for model in models])
        for key in ("total", "active")
    ]
    rows.append(("forward FLOPs per token", [summary.count(model["flops_per_token"]) for model in models]))
    rows.append(("tokens/s, forward, float32", [f"{model['tokens_per_second']:,.0f}" for model in models]))
    return [{"title": "size and speed", "basis": "", "rows": rows}]


def downstream(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores in the same form: a group for every task, a row for every metric that has a standard error."""
    groups = []
    for task, first in evaluation["dense"]["tasks"].items():
        entries = [evaluation[key]["tasks"][task] for key in summary.MODELS]
        rows = [
            (metric, [f"{entry[metric]:.3f} ± {entry[f'{metric}_stderr']:.3f}" for entry in entries])
            for metric in first
            if f"{metric}_stderr" in first
        ]
        basis = f"n = {first['n']}, {first['num_fewshot']}-shot, {first['harness']}, {first['dtype']}"
        groups.append({"title": task, "basis": basis, "rows": rows})
    return groups


def heat_maps(results: Results) -> list[dict[str, Any]]:
    """Expert load per layer, before and after training."""
    import numpy as np

    found = []
    for key, title in (("split", "After the split"), ("trained", "After training")):
        load_LE = np.sum([np.asarray(load) for load in results.routing[key].values()], axis=0)
        share_LE = np.sort(load_LE / load_LE.mean(1, keepdims=True), axis=1)[:, ::-1]
        figures = results.evaluation["routing"][key]
        chart = charts.heat_map(share_LE.tolist(), top=HEAT_TOP, label=f"expert load per layer, {title.lower()}")
        found.append(
            {
                "title": title,
                "chart": Markup(chart),
                "top": f"{HEAT_TOP:g}",
                "caption": f"{load_LE.shape[0]} layers × {load_LE.shape[1]} experts. The busiest expert of a layer "
                f"gets {figures['peak']:.1f} times the even share on average; {figures['unused']:.1%} of the experts "
                "got no token.",
            }
        )
    return found


def specialisation(results: Results) -> list[dict[str, Any]]:
    """Total variation distance between a domain's routing and that of all domains, per layer; none for one domain."""
    import numpy as np

    found = []
    for key, title in (("split", "after the split"), ("trained", "after training")):
        loads = {domain: np.asarray(load, dtype=float) for domain, load in results.routing[key].items()}
        if len(loads) < 2:
            return []
        shares = {domain: load / load.sum(1, keepdims=True) for domain, load in loads.items()}
        centre = np.mean(list(shares.values()), axis=0)
        distances = {domain: (np.abs(share - centre).sum(1) / 2).tolist() for domain, share in shares.items()}
        curves = {domain: list(enumerate(values, start=1)) for domain, values in distances.items()}
        chart = charts.lines(curves, x_label="layer", y_label="distance from the mean routing", zero=True)
        found.append({"title": f"Specialisation {title}", "chart": Markup(chart)})
    return found


def mixture(results: Results) -> str:
    """How the starting weights came about."""
    references = results.mixture.get("evidence", {}).get("reference_losses") or {}
    text = f"Starting weights by method {results.mixture['method']}."
    if references:
        losses = ", ".join(f"{domain} {value:.3f}" for domain, value in references.items())
        text += f" Reference losses of the dense parent, nats/token: {losses}."
    return text


def licences(results: Results) -> list[dict[str, str]]:
    """Model and local tasks with their licences and sources; those of the domains stand in the corpus section."""
    rows = [{"what": results.pipeline.model, "license": results.model.license, "source": results.model.source}]
    rows += [
        {"what": f"task: {task.name}", "license": task.license or "as on the hub", "source": task.source or "hub"}
        for task in results.pipeline.evaluate.tasks
    ]
    return rows


def versions(results: Results) -> list[tuple[str, str]]:
    """Interpreter, packages, code and machine."""
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "not installed as a package"))
    found.append(("code (git)", code_version()))
    machine = results.evaluation["machine"]
    found.append(("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads used"))
    found.append(("evaluated on", machine.get("gpu", machine["device"])))
    return found


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

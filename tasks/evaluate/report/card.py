"""Writes the checkpoint to ship: hard links to the trained one, the evaluated windows, and the model card."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tasks import architectures, scratch
from tasks.engines import overrides
from tasks.evaluate import answer, summary
from tasks.evaluate.report import hub_metadata
from tasks.evaluate.report.results import Results
from tasks.moe import counts

_FIGURES = 4
"""Rows of the table in the answer; what follows of it is on speed, and stands in the table of the evaluation."""
SNIPPET = """\
import json, math, torch
from transformers import AutoModelForCausalLM

options = {"dtype": torch.float32, "experts_implementation": "eager"}
model = AutoModelForCausalLM.from_pretrained(".", **options).eval()
losses = {}
for domain, windows in json.load(open("heldout.json")).items():
    ids = torch.tensor(windows)
    with torch.no_grad():
        nats = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in ids]
    losses[domain] = sum(nats) / len(nats)
    print(f"{domain}: perplexity {math.exp(losses[domain]):.2f}")
print(f"mean: perplexity {math.exp(sum(losses.values()) / len(losses)):.2f}")
"""


def write(folder: Path, results: Results, *, trained: Path, heldout: Path) -> None:
    """Fill the empty `folder` with links to the files of `trained` and to `heldout`, and write README.md beside them.

    Links keep the weights on the disk once. README.md is a file of its own: nothing may be written into a file that
    `trained` shares.
    """
    for path in sorted(trained.rglob("*")):
        target = folder / path.relative_to(trained)
        if path.is_dir():
            target.mkdir()
        elif path.name != "README.md":
            scratch.link(path, target)
    scratch.link(heldout, folder / "heldout.json")
    (folder / "README.md").write_text(text(results))


def text(results: Results) -> str:
    """The model card, Hub metadata first."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(loader=PackageLoader("tasks.evaluate.report", "."), undefined=StrictUndefined, trim_blocks=True)
    env.filters["code"] = _code
    answers, (beside, figures) = answer.sentences(results.evaluation), answer.table(results.evaluation)
    return env.get_template("card.md.j2").render(
        metadata=hub_metadata.front_matter(results),
        name=results.name,
        model=results.pipeline.model,
        source=results.model.source,
        shape=shape(results),
        columns=summary.titles(results.evaluation),
        conversion=summary.conversion(results.evaluation),
        rows=summary.rows(results.evaluation),
        answers=answers,
        beside=beside,
        figures=figures[:_FIGURES],
        notes=[note for note in summary.notes(results.evaluation) if note not in answers],
        perplexity=f"{results.evaluation['trained']['perplexity']['mean']:.2f}",
        snippet=SNIPPET,
        domains=[domain(results, name) for name in results.corpus_metrics["domains"]],
        samples=samples(results),
        new_tokens=results.samples["new_tokens"],
        repeated=repeated(results),
        license=results.model.license,
        tokens=f"{results.pretrain['tokens']:,}",
    )


def samples(results: Results) -> list[dict[str, Any]]:
    """For each prompt: {prompt, texts: [(column, the continuation by that model)]}."""
    columns = list(zip(summary.models(results.evaluation), summary.titles(results.evaluation), strict=True))
    return [
        {"prompt": entry["prompt"], "texts": [(title, entry[key]) for key, title in columns]}
        for entry in results.samples["samples"]
    ]


def repeated(results: Results) -> list[str]:
    """Share of repeated 4-grams of each model's samples, averaged over them: one text per column."""
    shares = results.samples["repetition"]
    return [f"{statistics.fmean(shares[key]):.0%}" for key in summary.models(results.evaluation)]


def domain(results: Results, name: str) -> dict[str, str]:
    """A row of the card's table: the tokens that training read of a domain, and its licence."""
    entry, ran = results.corpus_metrics["domains"][name], results.pretrain
    return {
        "name": name,
        "tokens": f"{ran['domain_tokens'].get(name, 0):,}",
        "epochs": f"{ran['domain_epochs'].get(name, 0.0):.3f}",
        "weight": results.weight(name),
        "license": entry["license"],
        "source": entry["source"],
    }


def shape(results: Results) -> str:
    """One sentence on how the experts were made, one on what is active for a token."""
    partition, model = results.pipeline.partition, results.pipeline.model
    sparse, layers = counts.experts(results.config), results.config["num_hidden_layers"]
    sizes = results.evaluation["trained"]["parameters"]
    if not sparse["layers"]:
        return f"All {layers} layers of {model} stay dense ({results.config['architectures'][0]})."
    where = f"Each FFN of {model}"
    if len(sparse["layers"]) < layers:
        where += f" in {len(sparse['layers'])} of its {layers} layers"
    routed = f"{sparse['experts']} routed experts of {sparse['expert_size']} neurons"
    if partition.method == "copy":
        made = f"is copied, whole or in slices, into {routed}"
    elif partition.may_overlap:
        made = f"is divided into {routed}, which may share neurons"
    else:
        made = f"is split into {routed}"
    if partition.shared_experts:
        ones = "one" if partition.shared_experts == 1 else "ones"
        made += f"{',' * partition.may_overlap} beside {partition.shared_experts} shared {ones}"
    dial = ""
    if values := architectures.elastic(results.config):
        ways = "; ".join(f"{engine} `{option}`" for engine, option in overrides.by_engine(results.config).items())
        dial = f" It serves {', '.join(map(str, values[:-1]))} or {values[-1]} of them (K) by override: {ways}."
    return (
        f"{where} {made} (method {partition.method}). Each token uses {sparse['top_k']} of the routed experts, and "
        f"{summary.count(sizes['active'])} of {summary.count(sizes['total'])} parameters "
        f"({results.config['architectures'][0]}).{dial}"
    )


def printable(text: str) -> str:
    """A model's text with line feeds for all line breaks and U+FFFD for unprintable characters."""
    lines = text.splitlines()
    return "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs(4)) for line in lines)


def _code(text: str) -> str:
    """An indented code block of Markdown, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in printable(text).split("\n"))

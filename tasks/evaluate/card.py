"""The checkpoint to ship: hard links of the trained one, the judged windows, and a model card to check them by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tasks.evaluate import summary
from tasks.evaluate.results import Results
from tasks.moe import counts

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

    Links, because the weights need no second place on the disk; README.md is a file of its own, so that nothing is
    ever written into a file that `trained` shares.
    """
    for path in sorted(trained.rglob("*")):
        target = folder / path.relative_to(trained)
        if path.is_dir():
            target.mkdir()
        elif path.name != "README.md":
            _link(path, target)
    _link(heldout, folder / "heldout.json")
    (folder / "README.md").write_text(text(results))


def text(results: Results) -> str:
    """The model card, Hub metadata first."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(loader=PackageLoader("tasks.evaluate", "."), undefined=StrictUndefined, trim_blocks=True)
    data = ModelCardData(
        base_model=base_model(results),
        datasets=[domain.source for domain in results.corpus.domains.values()],
        library_name="transformers",
        license=license_id(results.model.license),
        metrics=["perplexity", "bits_per_byte", *(["accuracy"] if results.evaluation["dense"]["tasks"] else [])],
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", results.config["model_type"], "moeforge"],
    )
    return env.get_template("card.md.j2").render(
        metadata=data.to_yaml().strip(),
        name=results.name,
        model=results.pipeline.model,
        source=results.model.source,
        shape=shape(results),
        columns=list(summary.MODELS.values()),
        rows=summary.rows(results.evaluation),
        basis=summary.basis(results.evaluation),
        perplexity=f"{results.evaluation['trained']['perplexity']['mean']:.2f}",
        snippet=SNIPPET,
        domains=results.corpus_metrics["domains"],
        license=results.model.license,
        tokens=f"{results.pretrain['tokens']:,}",
    )


def shape(results: Results) -> str:
    """One sentence: how the FFN was cut and what a token passes."""
    partition = results.pipeline.partition
    width = counts.experts(results.config)["expert_size"]
    sizes = results.evaluation["trained"]["parameters"]
    shared = f" beside {partition.shared_experts} shared ones" if partition.shared_experts else ""
    return (
        f"Each FFN of {results.pipeline.model} is cut into {partition.experts} routed experts of {width} neurons"
        f"{shared}; a token passes {partition.top_k} of the routed ones, {summary.count(sizes['active'])} of "
        f"{summary.count(sizes['total'])} parameters ({results.config['architectures'][0]})."
    )


def base_model(results: Results) -> str:
    """The hub id of the dense parent, or its name in pipelines.yaml where it does not come from the hub."""
    source: Any = results.model.source
    if source.startswith("hub:"):
        return source.removeprefix("hub:").partition("@")[0]
    return results.pipeline.model


def license_id(text: str) -> str:
    """The Hub's spelling of an SPDX identifier."""
    return text.lower().replace(" ", "-")


def _link(path: Path, target: Path) -> None:
    os.link(path, target)

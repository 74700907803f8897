"""What does not fit together: a pipeline's settings with its corpus's domains, its model's sizes, and lm-eval's tasks.

Each section is valid by itself when this looks at it. What is read, the fetched model's config.json and the names of
lm-eval's tasks, lies on this disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import tasks.settings.harness as harness
import tasks.settings.model as model
import tasks.settings.suites as suites
from tasks import plugin
from tasks.settings.corpus import Corpus
from tasks.settings.evaluate import Evaluate
from tasks.settings.model import Model
from tasks.settings.pipeline import Pipeline


def faults(pipelines: dict[str, Pipeline], *, corpora: dict[str, Corpus], models: dict[str, Model]) -> Iterator[str]:
    """Every fault, as `path = value: what is wrong and how to fix it`."""
    for name, pipeline in pipelines.items():
        where = f"pipelines.{name}"
        yield from (f"{where}.mixture.{fault}" for fault in _mixture(pipeline, corpora[pipeline.corpus]))
        yield from (f"{where}.{fault}" for fault in _sizes(pipeline, models[pipeline.model]))
        yield from (f"{where}.{fault}" for fault in _tasks(pipeline.evaluate))
        for module in plugin.modules("settings").values():
            if hasattr(module, "faults"):
                yield from (f"{where}.{fault}" for fault in module.faults(pipeline, corpus=corpora[pipeline.corpus]))


def _tasks(evaluate: Evaluate) -> Iterator[str]:
    """Suites and tasks that do not exist, or whose items are nowhere."""
    try:
        judged = {task.name: task for task in suites.judged(evaluate)}
    except ValueError as error:
        yield f"evaluate.{error}"
        return
    for i, task in enumerate(evaluate.tasks):
        if fault := harness.why_no_items(task.name, judged[task.name].local):
            yield f"evaluate.tasks.{i}.name = {task.name!r}: {fault}"


def _mixture(pipeline: Pipeline, corpus: Corpus) -> Iterator[str]:
    """Weights or a target of domains that the corpus lacks, and a swarm too small for its domains."""
    mixture, domains = pipeline.mixture, corpus.trained
    if mixture.weights and (fault := corpus.other_domains(mixture.weights, name=pipeline.corpus)):
        fix = "; give a domain the weight 0 to leave it out" if " missing" in fault else ""
        yield f"weights {fault}{fix}"
    if mixture.proxy and len(domains) < 2:
        yield (
            f"method = {mixture.method!r}: corpora.{pipeline.corpus} has a single domain, {domains[0]}, to train on, "
            "so there is nothing to weigh; set method: uniform"
        )
    for name in mixture.targets(domains):
        if name not in corpus.domains:
            yield (
                f"target = {mixture.target!r}: corpora.{pipeline.corpus} has no domain {name}; it has "
                f"{', '.join(corpus.domains)}, or set target: mean"
            )
    if mixture.swarm:
        try:
            mixture.swarm.require(len(domains))
        except ValueError as error:
            yield f"swarm.{error}"


def _sizes(pipeline: Pipeline, entry: Model) -> Iterator[str]:
    """What the model is too small for, as far as its config is known."""
    known = model.config(pipeline.model, entry)
    if known is None:
        return
    config, source = known
    partition, distill = pipeline.partition, pipeline.pretrain.distill
    width, layers, vocabulary = (
        size if isinstance(size := config.get(field), int) else None
        for field in ("intermediate_size", "num_hidden_layers", "vocab_size")
    )
    try:
        if width:
            partition.check_width(width)
        if layers and not partition.sparse_layers(layers):
            yield f"partition.layers = {partition.layers!r}: of {layers} layers ({source}) none would become sparse"
    except ValueError as error:
        yield f"partition: {error}"
    try:
        if width and layers and pipeline.pruned:
            pruned = pipeline.pruned.config(config, partition)
            for field in ("num_hidden_layers", "hidden_size"):
                if distill and pruned.get(field) != config.get(field):
                    yield (
                        f"control.shape.{field} = {pruned[field]}: the parent has {config[field]}, and "
                        "pretrain.distill compares student and parent layer by layer; leave one of them out"
                    )
    except ValueError as error:
        if str(error).startswith("pruned"):
            yield f"control = {error}"
        elif str(error).startswith("shape"):  # else it stands there already
            yield f"control.{error}"
    proxy = pipeline.mixture.proxy
    if proxy and proxy.layers and layers and proxy.layers > layers:
        yield (
            f"mixture.proxy.layers = {proxy.layers}: {pipeline.model} has {layers} ({source}); set it to that or "
            "less, or leave it out"
        )
    limit = model.positions(config)
    lengths = {"pretrain": pipeline.pretrain.seq_len, "evaluate": pipeline.evaluate.seq_len}
    if proxy and proxy.model != "scratch":
        lengths["mixture.proxy"] = proxy.seq_len
    for section, seq_len in lengths.items():
        if limit is not None and seq_len > limit:
            yield (
                f"{section}.seq_len = {seq_len}: {pipeline.model} has max_position_embeddings = {limit} ({source}); "
                f"set it to {limit} or less"
            )
    if distill and distill.top_n and vocabulary and distill.top_n > vocabulary:
        yield (
            f"pretrain.distill.top_n = {distill.top_n}: the vocabulary has {vocabulary} tokens ({source}); set it to "
            "less, or leave it out to keep the parent in memory"
        )

"""What an estimate of domain weights costs before it runs: trainings of a proxy, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import architectures, plugin
from tasks.moe import counts
from tasks.settings import Corpus, Pipeline
from tasks.settings.mixture import ONLINE, Proxy


@dataclass(frozen=True, kw_only=True)
class MixturePlan:
    """Figures of an estimate. What is finished of a swarm is not counted."""

    trainings: int
    """That are to be run."""
    done: int
    """Proxy runs of a swarm that are there, and count if they are of the same inputs."""
    tokens: int
    """Of all trainings to be run together."""
    flops: int
    """Training, what a method adds to it, and validation."""
    share: float
    """`tokens` as a share of the training that the weights are for."""
    flops_share: float
    what: str
    """The proxy, in words."""


def plan(
    name: str,
    pipeline: Pipeline,
    *,
    dense: dict[str, Any],
    sparse: dict[str, Any],
    corpus: Corpus,
    training_flops: int,
) -> MixturePlan | None:
    """Compute the figures of pipeline `name`; None for a method that trains no proxy.

    Args:
        dense: config.json of the parent.
        sparse: of the converted model.
        corpus: what the proxies are trained on.
        training_flops: of the training that the weights are for.
    """
    mixture = pipeline.mixture
    if mixture.proxy is None:
        return None
    domains = list(corpus.trained)
    proxy = mixture.proxy.holding(len(domains)) if mixture.method in ONLINE else mixture.proxy
    config = proxy_config(proxy, dense=dense, sparse=sparse)
    estimator = plugin.modules("estimator")[mixture.method]
    done, trainings = 0, mixture.seeds
    if hasattr(estimator, "trainings"):
        trainings *= estimator.trainings(mixture)
    if mixture.swarm is not None:
        done = min(mixture.swarm.units, sum(1 for _ in Path("runs", name, "swarm").glob("*.json")))
        trainings = mixture.swarm.units - done
    step = proxy.batch * proxy.seq_len
    each = -(-proxy.tokens // step) * step
    per_token = counts.flops_per_token(config, seq_len=proxy.seq_len)
    measured = len({*domains, *mixture.targets(domains)})
    added = 0.0
    if hasattr(estimator, "forward_tokens"):
        added = mixture.seeds * estimator.forward_tokens(mixture, proxy, tokens=each, domains=domains)
    validation = 2 * proxy.windows * measured * proxy.seq_len  # before the first step and after the last
    flops = trainings * (each * per_token["train"] + validation * per_token["forward"])
    flops += round(added * per_token["forward"])
    tokens = trainings * each
    return MixturePlan(
        trainings=trainings,
        done=done,
        tokens=tokens,
        flops=flops,
        share=tokens / pipeline.pretrain.tokens,
        flops_share=flops / training_flops,
        what=_named(proxy, config),
    )


def proxy_config(proxy: Proxy, *, dense: dict[str, Any], sparse: dict[str, Any]) -> dict[str, Any]:
    """config.json of a proxy as far as counts need it."""
    if proxy.model == "scratch":
        return {
            "model_type": architectures.LLAMA.model_type,
            **proxy.sizes.model_dump(),
            "vocab_size": dense["vocab_size"],
            "tie_word_embeddings": True,
        }
    whole = dense if proxy.model == "parent" else sparse
    layers = min(proxy.layers or whole["num_hidden_layers"], whole["num_hidden_layers"])
    config = {**whole, "num_hidden_layers": layers}
    for field in ("layer_types", "mlp_only_layers"):
        if (listed := whole.get(field)) is not None:
            config[field] = listed[:layers] if field == "layer_types" else [i for i in listed if i < layers]
    return config


def _named(proxy: Proxy, config: dict[str, Any]) -> str:
    size = f"{config['num_hidden_layers']} layers of {config['hidden_size']}"
    whose = {"scratch": "a LLaMA from scratch", "parent": "the parent", "student": "the converted model"}[proxy.model]
    return f"{whose}, {size}"

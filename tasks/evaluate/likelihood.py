"""Loss per domain: nats per token, perplexity, bits per byte, expert load."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import architectures
from tasks.moe import counts as counts_of
from tasks.moe import loss, routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(
    model: PreTrainedModel,
    windows: Mapping[str, np.ndarray],
    *,
    batch: int,
    progress: Callable[[str, float], None] = lambda domain, nats: None,
) -> dict[str, Any]:
    """Run a model over the windows.

    Args:
        model: a causal language model; its dtype and device are those of the measurement.
        windows: {domain: int64 [B, L] token ids}.
        batch: windows per forward pass.
        progress: called with (domain, its loss in nats per token) after each domain.

    Returns:
        nats {domain: [summed nats of each window]}; load {domain: [layers][experts] tokens sent there}, {} for a dense
        model.
    """
    nats: dict[str, list[float]] = {}
    load: dict[str, list[list[int]]] = {}
    sparse = architectures.is_moe(model.config)
    for domain, ids_BL in windows.items():
        sums: list[float] = []
        with routing.expert_load(model) if sparse else nullcontext() as load_LE:
            for i in range(0, len(ids_BL), batch):
                sums.extend(loss.window_nll(model, ids_BL[i : i + batch], batch=batch).tolist())
        nats[domain] = sums
        if load_LE is not None:
            load[domain] = load_LE.tolist()
        progress(domain, sum(sums) / predicted(ids_BL))
    return {"nats": nats, "load": load}


def by_top_k(model: PreTrainedModel, windows: Mapping[str, np.ndarray], *, batch: int) -> dict[str, dict[str, Any]]:
    """An elastic model at each value of top_k that it serves, on the windows of `measure`; {} for any other model.

    Returns:
        {top_k: {nats: as `measure` gives; active: parameters of a token; flops_per_token: of a forward pass}}.
    """
    found: dict[str, dict[str, Any]] = {}
    usual, length = counts_of.experts(model.config)["top_k"], next(iter(windows.values())).shape[1]
    try:
        for top_k in architectures.elastic(model.config):
            _choose(model, top_k)
            nats = measure(model, windows, batch=batch)["nats"]
            found[str(top_k)] = {
                "nats": nats,
                "active": counts_of.parameters(model.config)["active"],
                "flops_per_token": counts_of.flops_per_token(model.config, seq_len=length)["forward"],
            }
    finally:
        if found:
            _choose(model, usual)
    return found


def _choose(model: PreTrainedModel, top_k: int) -> None:
    model.config.num_experts_per_tok = top_k
    for router in routing.routers(model):
        router.top_k = top_k  # type: ignore[assignment]


def predicted(ids_BL: np.ndarray) -> int:
    """Tokens predicted in [B, L] windows: each but the first of its window."""
    windows, length = ids_BL.shape
    return int(windows * (length - 1))


def counts(windows: Mapping[str, np.ndarray], *, token_bytes: np.ndarray) -> dict[str, dict[str, int]]:
    """Per domain: windows, predicted tokens, and the UTF-8 bytes that these tokens stand for.

    Args:
        windows: {domain: int64 [B, L]}.
        token_bytes: int64 [vocabulary], bytes of each id (tasks.corpus.tokenizer.encoder.token_bytes).
    """
    return {
        domain: {
            "windows": len(ids_BL),
            "tokens": predicted(ids_BL),
            "bytes": int(token_bytes[ids_BL[:, 1:]].sum()),
        }
        for domain, ids_BL in windows.items()
    }


def by_window(
    windows: Mapping[str, np.ndarray], nats: Mapping[str, Mapping[str, list[float]]], *, token_bytes: np.ndarray
) -> dict[str, dict[str, list[Any]]]:
    """The content of windows.json, by which two evaluations are compared on the windows that they share.

    Args:
        windows: {domain: int64 [B, L]}.
        nats: {model: {domain: [summed nats of each window]}}.
        token_bytes: int64 [vocabulary].

    Returns:
        {domain: {windows: digests of their ids, bytes: of their predicted tokens, and each model: its nats}}.
    """
    return {
        domain: {
            "windows": [hashlib.sha256(ids_L.astype("<i8").tobytes()).hexdigest()[:16] for ids_L in ids_BL],
            "bytes": token_bytes[ids_BL[:, 1:]].sum(1).tolist(),
            **{model: [round(value, 4) for value in by_domain[domain]] for model, by_domain in nats.items()},
        }
        for domain, ids_BL in windows.items()
    }


def scores(nats: Mapping[str, list[float]], test: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Turn summed nats into loss, perplexity and bits per byte, each {domain: …, mean: …}.

    loss is in nats per predicted token. The mean is over domains, each counting the same whatever its size;
    the mean perplexity is the exponential of the mean loss.
    """
    losses = {domain: sum(sums) / test[domain]["tokens"] for domain, sums in nats.items()}
    bits = {domain: loss.bits_per_byte(sum(sums), num_bytes=test[domain]["bytes"]) for domain, sums in nats.items()}
    losses["mean"] = statistics.fmean(losses.values())
    bits["mean"] = statistics.fmean(bits.values())
    perplexities = {domain: loss.perplexity(value) for domain, value in losses.items()}
    return {"loss": losses, "perplexity": perplexities, "bits_per_byte": bits}


def difference(
    first: Mapping[str, list[float]], second: Mapping[str, list[float]], test: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """Mean loss of the first model minus the second's on the same windows, in nats per token, with its paired stderr.

    Windows are the draws, domains the strata: var = sum over domains of var_d / n_d, over domains squared. The stderr
    is left out where a domain has a single window.
    """
    means, variances = [], []
    for domain, sums in first.items():
        per_window = test[domain]["tokens"] / test[domain]["windows"]
        deltas = [(a - b) / per_window for a, b in zip(sums, second[domain], strict=True)]
        means.append(statistics.fmean(deltas))
        if len(deltas) > 1:
            variances.append(statistics.variance(deltas) / len(deltas))
    result = {"loss": statistics.fmean(means)}
    if len(variances) == len(means):
        result["stderr"] = math.sqrt(sum(variances)) / len(means)
    return result

"""A packed window's loss and gradients against its documents run alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    modeling_flash_attention_utils,
)

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.moe.internals import layers
from tasks.pretrain.loss import losses, objective
from tasks.pretrain.loss.balance import Balancer
from tasks.settings import Pretrain

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 6}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    ),
    "granitemoeshared": (
        GraniteMoeSharedForCausalLM,
        GraniteMoeSharedConfig,
        {"num_local_experts": 6, "shared_intermediate_size": 16},
    ),
}
LENGTH = 24
WINDOWS = [[9, 1, 14], [3, 11, 6]]
"""Tokens of the documents of each window; the second has 4 of padding."""


def build(family: str, attention: str = "sdpa") -> PreTrainedModel:
    kind, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**SIZES, **sizes))
    model.config._attn_implementation = attention
    return model.train()


def packed(windows: list[list[int]], *, masked: bool, padding: int = 0) -> Batch:
    """A batch as the loader makes it."""
    rng = np.random.default_rng(0)
    shape = (len(windows), LENGTH)
    ids, labels = np.full(shape, padding), np.full(shape, IGNORED)
    positions, cuts = np.zeros(shape, dtype=np.int64), []
    for b, lengths in enumerate(windows):
        start = 0
        for length in [*lengths, LENGTH - sum(lengths)]:
            stop = start + length
            positions[b, start:stop] = np.arange(length)
            cuts += [b * LENGTH + start] if length else []
            start = stop
        real = sum(lengths)
        ids[b, :real] = rng.integers(1, SIZES["vocab_size"], real)
        labels[b, :real] = ids[b, :real]
        labels[b][(positions[b] == 0) & masked] = IGNORED
    cu_seqlens = np.array([*cuts, len(windows) * LENGTH], dtype=np.int32)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions if masked else None,
        cu_seqlens=cu_seqlens,
        domains=["prose"] * len(windows),
        windows=list(range(len(windows))),
        step_targets=int(losses.predicted_tokens(labels).sum()),
    )


def run(model: PreTrainedModel, batch: Batch, *, balance: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return part(model, batch, rows=slice(0, len(batch.input_ids)), balance=balance)


def part(model: PreTrainedModel, batch: Batch, *, rows: slice, balance: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each of the windows `rows`, the mean over its tokens, and transformers' balance loss."""
    params = Pretrain(
        tokens=LENGTH, seq_len=LENGTH, batch=1, learning_rate=1, balance={"loss": "mixtral", "coefficient": 1.0}
    )
    balancer = Balancer(params, model) if balance else None
    result = objective.Objective(params, model, balancer=balancer, distiller=None)(
        batch, rows=rows, device=torch.device("cpu")
    )
    assert list(result.parts) == ["balance"] * balance
    balances = result.parts.get("balance", torch.zeros(()))
    torch.testing.assert_close(result.total, result.nats_B.sum() / max(batch.step_targets, 1) + balances)
    return result.nats_B / torch.from_numpy(losses.predicted_tokens(batch.labels[rows])).clamp(min=1), balances


def alone(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The oracle: every document by itself; a window's loss is that of all their predicted tokens."""
    losses = []
    for ids, lengths in zip(batch.input_ids, WINDOWS, strict=True):
        nats, count, start = torch.zeros(()), 0, 0
        for length in lengths:
            document = torch.from_numpy(ids[start : start + length])[None]
            if length > 1:
                logits = model(input_ids=document, use_cache=False).logits[0, :-1]
                nats = nats + F.cross_entropy(logits.float(), document[0, 1:], reduction="sum")
                count += length - 1
            start += length
        losses.append(nats / count)
    return torch.stack(losses)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
    """What flash attention's variable-length function computes: each sequence by itself. q [tokens, heads, dim]."""
    ends = given["cu_seqlens_q"].tolist()
    assert given["max_seqlen_q"] == max(b - a for a, b in itertools.pairwise(ends))
    parts = [
        F.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=given["softmax_scale"], enable_gqa=True
        ).transpose(0, 1)
        for a, b in itertools.pairwise(ends)
    ]
    return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' flash attention path with `varlen` in the place of the CUDA kernel."""

    def fixed(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("attends across documents")

    def settings(**given: Any) -> dict[str, Any]:
        return {name: given[name] for name in ("softmax_scale", "max_seqlen_q", "max_seqlen_k")}

    functions = ((fixed, varlen, None, None, None), (settings, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _: functions)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("flash")
def test_a_window_of_masked_documents_has_the_loss_and_gradients_of_the_documents_alone(
    family: str, attention: str
) -> None:
    batch = packed(WINDOWS, masked=True)
    model = build(family)
    expected = alone(model, batch)
    wanted = gradients(model, expected.mean())
    model.config._attn_implementation = attention
    result, _ = run(model, batch)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    got = gradients(model, result.mean())
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_mask_a_document_sees_those_before_it(family: str) -> None:
    model = build(family)
    whole, _ = run(model, packed(WINDOWS, masked=False))
    assert (whole - alone(model, packed(WINDOWS, masked=False))).abs().min() > 1e-2


def test_micro_batches_of_masked_windows_are_cut_at_windows() -> None:
    model, batch = build("mixtral"), packed(WINDOWS, masked=True)
    together, _ = run(model, batch)
    for b in range(2):
        one, _ = part(model, batch, rows=slice(b, b + 1), balance=False)
        torch.testing.assert_close(one, together[b : b + 1], rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_keeps_documents_apart_too() -> None:
    model, batch = build("qwen2_moe"), packed(WINDOWS, masked=True)
    loss, _ = run(model, batch)
    wanted = gradients(model, loss.mean())
    layers.recompute_activations(model)
    again, _ = run(model, batch)
    assert torch.equal(again, loss)
    for name, gradient in gradients(model, again.mean()).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_adds_nothing_to_the_loss_the_balance_or_the_gradients(family: str, masked: bool) -> None:
    model = build(family)
    (loss, balance), (other, same) = (
        run(model, packed(WINDOWS, masked=masked, padding=p), balance=True) for p in (0, 7)
    )
    assert torch.equal(loss, other)
    assert torch.equal(balance, same)
    short = packed(WINDOWS[1:], masked=masked)
    cut = replace(short, input_ids=short.input_ids[:, :20], labels=short.labels[:, :20])
    if short.position_ids is not None:
        cut = replace(cut, position_ids=short.position_ids[:, :20], cu_seqlens=short.cu_seqlens[:-1])
    result, wanted = run(model, short, balance=True), run(model, cut, balance=True)
    for a, b in zip(result, wanted, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-6, atol=1e-7)
    ours, theirs = (gradients(model, loss.mean() + 0.1 * balance) for loss, balance in (result, wanted))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [[1] * LENGTH, [1]])
def test_a_window_in_which_nothing_is_predicted_has_loss_0_and_a_finite_balance(window: list[int]) -> None:
    loss, balance = run(build("mixtral"), packed([window], masked=True), balance=True)
    assert loss.tolist() == [0]
    assert balance.isfinite()


def test_unpacked_windows_have_bit_for_bit_the_mean_over_all_tokens_but_the_first() -> None:
    model, batch = build("mixtral"), packed([[LENGTH], [LENGTH]], masked=False)
    loss, balance = run(model, batch, balance=True)
    ids = torch.from_numpy(batch.input_ids)
    out = model(input_ids=ids, output_router_logits=True, use_cache=False)
    nats = F.cross_entropy(
        out.logits.float().flatten(0, 1), F.pad(ids[:, 1:], (0, 1), value=-100).flatten(), reduction="none"
    )
    assert torch.equal(loss, nats.view_as(ids).sum(1) / (LENGTH - 1))
    assert torch.equal(balance, out.aux_loss)
    assert losses.predicted_tokens(batch.labels).tolist() == [LENGTH - 1] * 2

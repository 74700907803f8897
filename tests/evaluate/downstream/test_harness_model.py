"""Likelihoods over tries against lm-eval's own forward passes, for every class that is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tasks import architectures
from tasks.evaluate.downstream.harness_model import Packed, takes_tries

Request = tuple[tuple[str, str], list[int], list[int]]


def requests(*, seed: int) -> list[Request]:
    """Items with several endings each, one after a long context, some of one token, two of them equal."""
    rng = np.random.default_rng(seed)
    made: list[Request] = []
    for length, endings in ((9, (1, 1, 3, 7)), (5, (2, 2)), (40, (4, 1, 6)), (1, (1, 5))):
        context = rng.integers(3, 60, length).tolist()
        made += [(("", ""), context, rng.integers(3, 60, size).tolist()) for size in endings]
    return [*made, made[0]]


@pytest.fixture(scope="module")
def wrapped(tiny_model: Path) -> Callable[..., Packed]:
    """Makes a random model of two layers and wraps it."""
    import torch

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(kind: str, attention: str = "sdpa", **fields: Any) -> Packed:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
        if kind in architectures.SPARSE:
            row = architectures.SPARSE[kind]
            fields = {row.experts: 4, "num_experts_per_tok": 2, row.expert_size: 16} | fields
        config = AutoConfig.for_model(kind, **sizes | heads | fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        return Packed(model, tokenizer, batch=2, dtype="float32")

    return make


@pytest.mark.parametrize("kind", [*architectures.DENSE, *architectures.SPARSE])
def test_likelihoods_are_those_of_lm_evals_own_forward_passes(wrapped: Callable[..., Packed], kind: str) -> None:
    lm = wrapped(kind)
    asked = requests(seed=1)
    assert takes_tries(lm.model, longest=50)
    ours = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    theirs = HFLM._loglikelihood_tokens(lm, asked, disable_tqdm=True)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_eager_attention_is_given_the_same_mask(wrapped: Callable[..., Packed]) -> None:
    asked = requests(seed=2)
    by_kind = [wrapped("llama", kind)._loglikelihood_tokens(asked, disable_tqdm=True) for kind in ("sdpa", "eager")]
    assert [nats for nats, _ in by_kind[0]] == pytest.approx([nats for nats, _ in by_kind[1]], abs=2e-5)


def test_what_a_sliding_window_would_cut_is_scored_by_lm_eval_itself(wrapped: Callable[..., Packed]) -> None:
    lm = wrapped("mistral", sliding_window=8)
    assert not takes_tries(lm.model, longest=9)
    asked = requests(seed=3)
    assert lm._loglikelihood_tokens(asked, True) == HFLM._loglikelihood_tokens(lm, asked, True)


def test_a_greedy_continuation_is_recognised(wrapped: Callable[..., Packed]) -> None:
    import torch

    lm = wrapped("llama")
    context = [5, 6, 7]
    with torch.no_grad():
        best = int(lm.model(torch.tensor([context])).logits[0, -1].argmax())
    answers = lm._loglikelihood_tokens([(("", ""), context, [best]), (("", ""), context, [(best + 1) % 64])], True)
    assert [greedy for _, greedy in answers] == [True, False]

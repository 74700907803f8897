"""The gradients of a step whose domains are weighed, against plain torch, and what moved the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.plugins.doge.hooks import Alignment
from tasks.plugins.doremi.hooks import Excess
from tasks.plugins.proxy_runs import rules
from tasks.pretrain import batches
from tasks.pretrain.engine import interface
from tasks.pretrain.hook import Step
from tasks.pretrain.launch.process import Process
from tasks.pretrain.loss.objective import Objective
from tasks.settings import Pretrain

pytestmark = pytest.mark.usefixtures("process_group")

LENGTH, ROWS, DOMAINS = 12, 8, ["a", "b"]
OF = ["b", "a", "a", "b", "a", "b", "b", "a"]
CPU = torch.device("cpu")
PROCESS = Process(rank=0, world_size=1, device=CPU, hosts=[])


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(seed: int = 0) -> Batch:
    """Eight windows, of which two have fewer targets."""
    ids = np.random.default_rng(seed).integers(0, 50, (ROWS, LENGTH))
    labels = ids.copy()
    labels[1, 5:] = labels[6, 9:] = IGNORED
    whole = batches.plain(ids, domain="a")
    return batches.replace(whole, labels=labels, domains=OF, step_targets=int((labels[:, 1:] != IGNORED).sum()))


def params(**fields: Any) -> Pretrain:
    given = {"tokens": 10 * ROWS * LENGTH, "seq_len": LENGTH, "batch": ROWS, "learning_rate": 0.5, "clip": 1e9}
    return Pretrain(**given | {"precision": "float32"} | fields)


def token_losses(of: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Of predicted tokens, [B, L - 1], 0 where nothing is predicted."""
    logits = of(input_ids=torch.from_numpy(batch.input_ids)).logits[:, :-1]
    labels = torch.from_numpy(batch.labels)[:, 1:]
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view_as(labels)


def step(of: Batch, number: int = 1, rate: float = 0.5) -> Step:
    return Step(number=number, batch=of, rate=rate, top_k=1)


def domain(name: str) -> torch.Tensor:
    return torch.tensor([each == name for each in OF])


def gradients(built: interface.Engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(weight).clone() for name, weight in built.module.named_parameters()}


def by_hand(loss: torch.Tensor, of: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(zip(dict(of.named_parameters()), torch.autograd.grad(loss, [*of.parameters()]), strict=True))


def same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_a_token_weighs_as_its_domain_by_the_excess_of_this_very_batch_and_its_loss_is_not_clipped(
    micro_batch: int,
) -> None:
    settings, whole, shares = params(micro_batch=micro_batch), batch(), {"a": 0.25, "b": 0.75}
    plain, reference = model(0), model(1)
    losses, known = token_losses(plain, whole), token_losses(reference, whole).detach()
    predicted = torch.from_numpy(whole.labels)[:, 1:] != IGNORED
    clipped = (losses.detach() - known).clamp(min=0)
    assert (losses.detach() < known).any(), "some tokens are better than the reference"
    scores = {name: float(clipped[domain(name)].sum() / predicted[domain(name)].sum()) for name in DOMAINS}
    moved = rules.doremi({"a": 0.5, "b": 0.5}, excess=scores)
    factor_B = sum(domain(name) * moved[name] / shares[name] for name in DOMAINS)
    expected = (factor_B[:, None] * losses).sum() / (factor_B[:, None] * predicted).sum()

    built = interface.build(model(0), settings)
    compute = Objective(settings, built, balancer=None, distiller=None)
    estimator = Excess(
        reference, shares=shares, micro_batch=micro_batch, vocabulary=50, process=PROCESS, model=built.module
    )
    compute.factors = estimator.factors
    estimator.before_step(step(whole))
    for start in range(0, ROWS, micro_batch):
        if start:
            built.next_micro_batch()
        built.backward(compute(whole, rows=slice(start, start + micro_batch), device=CPU).total)
    same(gradients(built), by_hand(expected, plain))
    assert estimator.weights == {"a": 0.5, "b": 0.5}
    estimator.settle()
    assert estimator.scores == pytest.approx(scores, rel=1e-4)
    assert estimator.weights == estimator.mean == pytest.approx(moved, rel=1e-4)
    built.discard_step()


def test_a_domain_that_a_batch_lacks_keeps_its_score_and_a_step_given_up_moves_nothing() -> None:
    student, absent = model(0), batches.select(batch(), np.flatnonzero(np.array(OF) == "a"))
    estimator = Excess(
        model(1), shares={"a": 0.5, "b": 0.5}, micro_batch=4, vocabulary=50, process=PROCESS, model=student
    )
    assert estimator.scores == dict.fromkeys("ab", pytest.approx(math.log(50)))
    nats = F.pad(token_losses(student, absent), (0, 1))
    estimator.factors(nats, absent, rows=slice(0, 4))
    estimator.settle(taken=False)
    assert estimator.weights == {"a": 0.5, "b": 0.5}
    estimator.before_step(step(absent))
    estimator.factors(nats, absent, rows=slice(0, 4))
    estimator.settle()
    assert estimator.scores["b"] == pytest.approx(math.log(50))
    assert estimator.scores["a"] < math.log(50)
    again = Excess(model(1), shares={"a": 0.5, "b": 0.5}, micro_batch=4, vocabulary=50, process=PROCESS, model=student)
    again.restore(estimator.state())
    assert again.state() == estimator.state()


def test_a_loss_that_is_not_finite_moves_no_weight() -> None:
    estimator = Excess(
        model(1), shares={"a": 0.5, "b": 0.5}, micro_batch=8, vocabulary=50, process=PROCESS, model=model(0)
    )
    factors = estimator.factors(torch.full((ROWS, LENGTH), math.nan), batch(), rows=slice(0, ROWS))
    assert factors.tolist() == [1.0] * ROWS
    estimator.settle()
    assert estimator.weights == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(("micro_batch", "clip", "zero"), [(2, 1e9, 1), (8, 1.0, 0)])
def test_a_domain_weighs_by_its_gradients_product_with_the_others_and_the_model_gets_the_weighted_sum(
    micro_batch: int, clip: float, zero: int
) -> None:
    settings, whole, plain = params(micro_batch=micro_batch, clip=clip, zero_stage=zero), batch(), model(0)
    losses, predicted = token_losses(plain, whole), torch.from_numpy(whole.labels)[:, 1:] != IGNORED
    parts, norms, flat = {}, {}, {}
    for name in DOMAINS:
        mean = losses[domain(name)].sum() / predicted[domain(name)].sum()
        parts[name] = dict(
            zip(
                dict(plain.named_parameters()),
                torch.autograd.grad(mean, [*plain.parameters()], retain_graph=True),
                strict=True,
            )
        )
        flat[name] = torch.cat([value.flatten() for value in parts[name].values()])
        scale = min(1.0, clip / float(flat[name].norm()))
        parts[name] = {key: value * scale for key, value in parts[name].items()}
        flat[name] *= scale
        norms[name] = float(flat[name].norm())
    product = float(flat["a"] @ flat["b"])
    moved = rules.doge({"a": 0.5, "b": 0.5}, gains={"a": product, "b": product}, norms=norms, rate=0.5)

    built = interface.build(model(0), settings)
    compute = Objective(settings, built, balancer=None, distiller=None)
    estimator = Alignment(
        settings, built, domains=DOMAINS, target=None, windows={}, objective=compute, process=PROCESS
    )
    (found,) = estimator.backward(step(whole))
    assert found.nats_B.tolist() == pytest.approx(losses.sum(1).tolist(), rel=1e-4)
    estimator.settle()
    assert estimator.scores == pytest.approx({"a": product, "b": product}, rel=1e-4)
    assert estimator.weights == pytest.approx(moved, rel=1e-4)
    expected = {key: sum(moved[name] * parts[name][key] for name in DOMAINS) for key in parts["a"]}
    if zero:
        same(gradients(built), expected)
    else:
        same({name: weight.grad for name, weight in built.module.named_parameters()}, expected)
    built.discard_step()


def test_a_target_draws_the_weights_to_the_domain_whose_gradient_is_like_its_own() -> None:
    settings, whole = params(micro_batch=8), batch()
    held_out = whole.input_ids[np.array(OF) == "b"][:3]  # the very text of b
    built = interface.build(model(0), settings)
    estimator = Alignment(
        settings,
        built,
        domains=DOMAINS,
        target={"elsewhere": 1.0},
        windows={"elsewhere": held_out},
        objective=Objective(settings, built, balancer=None, distiller=None),
        process=PROCESS,
    )
    for number in (1, 2):
        estimator.backward(step(whole, number, 0.01))
        estimator.settle()
        built.discard_step()
    assert estimator.scores["b"] > estimator.scores["a"]
    assert estimator.weights["b"] > 0.5
    assert estimator.mean["b"] == pytest.approx((estimator.mean["b"] + 1 - estimator.mean["a"]) / 2)


def test_rows_of_a_packed_batch_keep_their_documents() -> None:
    positions = np.array([[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2]])
    whole = batches.replace(batches.plain(np.arange(12).reshape(3, 4), domain="a"), position_ids=positions)
    some = batches.select(whole, np.array([2, 1]))
    assert some.cu_seqlens.tolist() == [0, 1, 4, 6, 8]
    assert some.windows == [2, 1]
    assert batches.select(batches.replace(whole, position_ids=None), np.array([0, 2])).cu_seqlens.tolist() == [0, 4, 8]

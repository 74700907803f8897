"""Cross-entropy and KL in one pass over the logits, against torch's own formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.sampling.loader import IGNORED
from tasks.pretrain.loss import divergence

B, L, V, D = 3, 7, 50, 8


def head(scale: float, dtype: torch.dtype) -> torch.nn.Linear:
    linear = torch.nn.Linear(D, V, bias=False, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        linear.weight *= scale
    return linear


def problem(
    seed: int, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Linear]:
    """Student's logits, targets of which some are ignored (all of one window), the parent's states and its head."""
    torch.manual_seed(seed)
    target_BL = torch.randint(V, (B, L))
    target_BL[:, -1] = IGNORED
    target_BL[0, 2:4] = IGNORED
    target_BL[2] = IGNORED
    linear = head(scale, dtype)
    states_TD = torch.randn(B * L, D, dtype=dtype) * 3
    noise = torch.randn(B * L, V, dtype=dtype) * scale
    logits_BLV = (linear(states_TD) + noise).view(B, L, V).requires_grad_()
    return logits_BLV, target_BL, states_TD, linear


def plain(
    logits_BLV: torch.Tensor, target_BL: torch.Tensor, parent_BLV: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: the sum over counted tokens by torch's functions."""
    counted_BL = target_BL != IGNORED
    nats_BL = F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, ignore_index=IGNORED, reduction="none")
    own, parent = (F.log_softmax(x / temperature, -1) for x in (logits_BLV, parent_BLV))
    kl_BL = F.kl_div(own, parent, log_target=True, reduction="none").sum(-1) * counted_BL * temperature**2
    return nats_BL.sum(1), kl_BL.sum(1)


@pytest.fixture(params=[1, 4 * V], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time, or four; of the parent's logits, five."""
    monkeypatch.setattr(divergence, "_CACHE", request.param)
    monkeypatch.setattr(divergence, "_PRODUCT", 5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("coefficients", [(1.0, 1.0), (0.0, 2.0), (0.7, 0.1)])
@pytest.mark.parametrize("scale", [0.1, 6.0])
def test_losses_and_gradients_are_those_of_the_plain_formulas(
    temperature: float, coefficients: tuple[float, float], scale: float
) -> None:
    logits, target, states, linear = problem(0, scale, torch.float32)
    exact = logits.detach().double().requires_grad_()
    wanted = plain(exact, target, linear(states).double().view(B, L, V), temperature)
    parent = divergence.Resident(states, linear, temperature=temperature)
    ce, kl = coefficients
    result = divergence.losses(logits, target, parent, cross_entropy=ce, kl=kl, temperature=temperature)
    for ours, theirs in zip(result, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6 * L)
    factor_B = torch.tensor([0.5, 2.0, 1.0])  # windows may weigh differently
    (factor_B * (ce * result[0] + kl * result[1])).sum().backward()
    (factor_B * (ce * wanted[0] + kl * wanted[1])).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7 * L)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), scale=st.floats(0.01, 20), temperature=st.floats(0.3, 8))
def test_the_divergence_is_not_negative_and_its_gradient_sums_to_nothing(
    seed: int, scale: float, temperature: float
) -> None:
    logits, target, states, linear = problem(seed, scale, torch.float32)
    parent = divergence.Resident(states, linear, temperature=temperature)
    _, kl_B = divergence.losses(logits, target, parent, cross_entropy=0.0, kl=1.0, temperature=temperature)
    assert (kl_B > -1e-5 * L * temperature**2).all()
    kl_B.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(2), torch.zeros(B, L), rtol=0, atol=1e-5 * max(1, temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_equal_to_its_parent_has_no_divergence_and_no_gradient(
    dtype: torch.dtype, temperature: float
) -> None:
    logits, target, _, _ = problem(1, 2.0, dtype)
    parent = divergence.Resident(logits.detach().flatten(0, 1), lambda states: states, temperature=temperature)
    _, kl_B = divergence.losses(logits, target, parent, cross_entropy=0.0, kl=1.0, temperature=temperature)
    kl_B.sum().backward()
    assert logits.grad is not None
    assert not kl_B.any()
    assert not logits.grad.any()


def test_in_bfloat16_the_gradient_is_rounded_twice_and_the_losses_are_computed_in_float32() -> None:
    logits, target, states, linear = problem(2, 2.0, torch.bfloat16)
    exact = logits.detach().double().requires_grad_()
    wanted = plain(exact, target, linear(states).double().view(B, L, V), 1.0)
    parent = divergence.Resident(states, linear, temperature=1.0)
    result = divergence.losses(logits, target, parent, cross_entropy=1.0, kl=1.0)
    for ours, theirs in zip(result, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=1e-3)  # the parent's logits round too
    torch.stack(result).sum().backward()
    torch.stack(wanted).sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-2, atol=1e-4)


def test_other_proportions_than_announced_are_refused() -> None:
    logits, target, states, linear = problem(4, 1.0, torch.float32)
    parent = divergence.Resident(states, linear, temperature=1.0)
    nats_B, kl_B = divergence.losses(logits, target, parent, cross_entropy=1.0, kl=1.0)
    with pytest.raises(RuntimeError, match=r"weighted as 1\.0 to 1\.0"):
        (nats_B + 2 * kl_B).sum().backward()


def test_a_second_backward_is_refused() -> None:
    logits, target, states, linear = problem(5, 1.0, torch.float32)
    parent = divergence.Resident(states, linear, temperature=1.0)
    total = torch.stack(divergence.losses(logits, target, parent, cross_entropy=1.0, kl=1.0)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        total.backward()


def kept(states: torch.Tensor, linear: torch.nn.Module, n: int, temperature: float) -> divergence.Kept:
    logs = F.log_softmax(linear(states).double() / temperature, 1)
    top, ids = logs.topk(n, dim=1)
    rest = logs.exp().scatter(1, ids, 0.0).sum(1).log()
    return divergence.Kept(ids, top.float(), rest.float())


def merged(logs_TV: torch.Tensor, ids_TN: torch.Tensor) -> torch.Tensor:
    """Logs of N + 1 outcomes: those of `ids`, and all others."""
    others = logs_TV.scatter(1, ids_TN, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logs_TV.gather(1, ids_TN), others], 1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("coefficients", [(1.0, 1.0), (0.0, 2.0)])
@pytest.mark.parametrize("n", [1, 6, V - 1])
def test_kept_logits_give_the_divergence_of_them_and_of_all_others_as_one(
    n: int, coefficients: tuple[float, float], temperature: float
) -> None:
    logits, target, states, linear = problem(6, 3.0, torch.float32)
    exact = logits.detach().double().requires_grad_()
    ce, kl = coefficients
    parent = kept(states, linear, n, temperature)
    result = divergence.losses(logits, target, parent, cross_entropy=ce, kl=kl, temperature=temperature)
    theirs = F.log_softmax(linear(states).double() / temperature, 1)
    ids = theirs.topk(n, dim=1).indices
    own = F.log_softmax(exact.flatten(0, 1) / temperature, 1)
    kl_T = F.kl_div(merged(own, ids), merged(theirs, ids), log_target=True, reduction="none").sum(1)
    counted = target != IGNORED
    wanted_B = (kl_T.view(B, L) * counted).sum(1) * temperature**2
    nats_B, _ = plain(exact, target, exact, 1.0)
    torch.testing.assert_close(result[1].double(), wanted_B, rtol=1e-5, atol=1e-6)
    (ce * result[0] + kl * result[1]).sum().backward()
    (ce * nats_B + kl * wanted_B).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_with_all_logits_kept_the_divergence_and_its_gradient_are_the_whole_ones() -> None:
    results = []
    for kind in ("whole", "kept"):
        logits, target, states, linear = problem(7, 2.0, torch.float32)
        parent = (
            divergence.Resident(states, linear, temperature=1.5) if kind == "whole" else kept(states, linear, V, 1.5)
        )
        nats_B, kl_B = divergence.losses(logits, target, parent, cross_entropy=0.5, kl=1.0, temperature=1.5)
        (0.5 * nats_B + kl_B).sum().backward()
        results.append((kl_B.detach(), logits.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), scale=st.floats(0.01, 10), data=st.data())
def test_the_more_logits_are_kept_the_more_of_the_divergence_is_seen(
    seed: int, scale: float, data: st.DataObject
) -> None:
    logits, target, states, linear = problem(seed, scale, torch.float32)
    few, more = sorted(data.draw(st.tuples(st.integers(1, V), st.integers(1, V))))
    parents = [kept(states, linear, few, 1.0), kept(states, linear, more, 1.0)]
    every: list[divergence.Parent] = [*parents, divergence.Resident(states, linear, temperature=1.0)]
    seen = [divergence.losses(logits, target, p, cross_entropy=0.0, kl=1.0)[1] for p in every]
    slack = 1e-5 * (L + seen[2])
    assert (seen[0] > -slack).all()
    assert (seen[0] <= seen[1] + slack).all()
    assert (seen[1] <= seen[2] + slack).all()

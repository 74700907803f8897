"""One converted FFN: weights of neurons, the router's size, the scale, the refit, the fit."""

import numpy as np
import pytest
import torch
from dense_models import ffn

from tasks import settings
from tasks.partition import gradient_fit, router_init
from tasks.partition.converted import Converted, sum_of_weights
from tasks.partition.layer import Sizes

EXPERTS = np.random.default_rng(0).permutation(48).reshape(8, 6).astype(np.int32)
SIZES = Sizes(width=48, experts=6, shared=2, size=6, top_k=2)


def _converted(layer, *, experts=EXPERTS, sizes=SIZES, scale=2.0):
    router_ED = torch.randn(sizes.experts, 16, generator=torch.Generator().manual_seed(0))
    return Converted(layer, experts, sizes=sizes, router_ED=router_ED, scale=scale)


def _error(layer, ffn_):
    return sum(((h @ layer.down_DN.T) - ffn_.output(x, h)).square().sum().item() for x, h in layer.chunks())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_neurons_weight_is_the_sum_over_the_experts_that_hold_it(overlap):
    experts = np.stack([np.random.default_rng(i).permutation(48)[:6] for i in range(8)]) if overlap else EXPERTS
    layer = ffn(tokens=20)
    made = _converted(layer, experts=experts)
    index, weights = router_init.chosen(made.router_ED, layer.x_TD, top_k=2)
    expected = torch.zeros(20, 48)
    for t in range(20):
        expected[t, experts[:2].reshape(-1)] = 1
        for expert, weight in zip(index[t], weights[t], strict=True):
            expected[t, experts[2 + expert]] += 2 * weight
    torch.testing.assert_close(made.coefficients(layer.x_TD, made.router_ED), expected)


@pytest.mark.parametrize(
    ("scale", "expected"), [("unit", 2), ("paper", 4), ("mean", 8), ("variance", 4), ("calibrated", 2)]
)
def test_the_scale_is_what_the_routed_weights_sum_to(scale, expected):
    assert sum_of_weights(settings.Partition(method="random", experts=8, top_k=2, scale=scale), 64) == expected


def test_whole_copies_weigh_together_what_one_weighs():
    """4 copies in 2 slices, 2 copies chosen: 4 experts of weight 1/4 each; times 2 they are the mean of two copies."""
    assert sum_of_weights(settings.Partition(method="copy", experts=8, top_k=4, expert_size=24), 48) == 2


def test_tempering_keeps_the_choice_and_gives_the_logits_their_spread():
    layer = ffn()
    made = _converted(layer)
    before = router_init.chosen(made.router_ED, layer.x_TD, top_k=2)[0]
    made.temper(std=1e-3)
    assert torch.equal(router_init.chosen(made.router_ED, layer.x_TD, top_k=2)[0].sort(1)[0], before.sort(1)[0])
    assert (layer.x_TD @ made.router_ED.T).square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_unequal_weights_add_little_to_the_error_however_large_the_spread_asked_for():
    errors = {}
    for std in (1e-6, 0.1, 10.0):
        layer = ffn()
        made = _converted(layer)
        made.temper(std=std)
        errors[std] = _error(layer, made)
    assert errors[10.0] < 1.2 * errors[1e-6]
    assert errors[0.1] < 1.2 * errors[1e-6]


def test_a_calibrated_scale_is_the_best_one():
    layer = ffn()
    made = _converted(layer)
    made.calibrate()
    best, best_scale = _error(layer, made), made.scale
    for other in (0.99, 1.01):
        made.scale = best_scale * other
        assert _error(layer, made) > best


def test_a_refit_solves_the_penalised_weighted_least_squares():
    layer = ffn(tokens=5000)
    made = _converted(layer)
    before = _error(layer, made)
    ((x, h),) = list(_all(layer))
    weight = layer.weight_T = torch.linspace(0.5, 1.5, 5000)
    drift = layer.drift_TD = 0.1 * torch.randn(5000, 16)
    inputs = (h * made.coefficients(x, made.router_ED)).double()
    weighted = inputs * weight[:, None]
    penalty = 0.3 * (weighted * inputs).sum(0).mean()
    made.refit()
    assert _error(layer, made) < 0.9 * before
    change = (made.down_DN - layer.down_DN).double()
    wanted = h.double() @ layer.down_DN.double().T + drift
    gradient = (inputs @ made.down_DN.double().T - wanted).T @ weighted
    size = (penalty * change).abs().max().item()
    torch.testing.assert_close(gradient + penalty * change, torch.zeros_like(change), rtol=0, atol=1e-3 * size)


def test_experts_of_which_a_token_passes_one_are_refitted_together_with_what_each_has_of_its_own():
    layer = ffn(tokens=4000)
    weight = layer.weight_T = torch.linspace(0.5, 1.5, 4000)
    drift = layer.drift_TD = 0.1 * torch.randn(4000, 16)
    experts = np.array([[12, 13, 20, 21], [0, 1, 4, 5], [4, 5, 8, 9]], dtype=np.int32)
    made = _converted(layer, experts=experts, sizes=Sizes(width=48, experts=2, shared=1, size=4, top_k=1))
    before = _error(layer, made)
    made.refit_experts()
    assert _error(layer, made) < before
    ((x, h),) = list(_all(layer))
    error = (made.output(x, h) - h @ layer.down_DN.T - drift).double() * weight[:, None]
    expert = (x @ made.router_ED.T).argmax(1)
    inputs = (h * made.coefficients(x, made.router_ED)).double()
    own_sum, energy = torch.zeros(48, 16, dtype=torch.float64), 0.0
    for e in (0, 1):
        mine, passed = expert == e, [*experts[0], *experts[1 + e]]
        energy += (inputs[mine][:, passed].square() * weight[mine, None]).sum().item()
        own = inputs[mine][:, experts[1 + e]]
        change = made.change_EFD[e].double()
        penalty = 2560 / mine.sum() * (own.square() * weight[mine, None]).sum(0).mean() * change
        torch.testing.assert_close(own.T @ error[mine], -penalty, rtol=0, atol=1e-3 * penalty.abs().max().item())
        own_sum[passed] += inputs[mine][:, passed].T @ error[mine]
    common = 0.3 * energy / 48 * (made.down_DN - layer.down_DN).T.double()
    torch.testing.assert_close(own_sum, -common, rtol=0, atol=1e-3 * common.abs().max().item())


def _fitted(layer, *, passes, seed=0):
    made = _converted(layer)
    made.fit(passes, seed=seed)
    return made


@pytest.mark.parametrize("refit", ["refit", "refit_experts"])
def test_an_expert_that_no_calibration_token_passes_keeps_its_weights_and_the_others_are_refitted(refit):
    layer, never = ffn(), 3
    made = _converted(layer, sizes=Sizes(width=48, experts=6, shared=2, size=6, top_k=1), scale=1.0)
    made.router_ED[never] = made.router_ED[[0, 1]].mean(0)  # never above both
    before, error = made.down_DN.clone(), _error(layer, made)
    getattr(made, refit)()
    own = EXPERTS[2 + never]
    torch.testing.assert_close(made.down_DN[:, own], before[:, own])
    assert _error(layer, made) < 0.9 * error


def test_a_fit_loses_less_on_other_tokens_too_and_leaves_router_and_choices():
    layer = ffn(tokens=5000)
    before = _converted(layer)
    other = ffn(tokens=600)
    other.x_TD = torch.randn(600, 16, generator=torch.Generator().manual_seed(9))
    fitted = _fitted(layer, passes=4)
    assert _error(layer, fitted) < 0.9 * _error(layer, before)
    assert _error(other, fitted) < 0.9 * _error(other, before)
    assert torch.equal(fitted.router_ED, before.router_ED)
    assert torch.equal(layer.down_DN, ffn(tokens=5000).down_DN)


def test_a_fit_follows_what_the_layers_below_have_lost_and_weighs_tokens():
    layer = ffn(tokens=600)
    still = _fitted(layer, passes=40)
    layer.drift_TD = torch.ones(600, 16)
    moved = _fitted(layer, passes=40)
    x, h = next(_all(layer))
    assert (moved.output(x, h) - still.output(x, h)).mean() > 0.3
    layer.weight_T = torch.zeros(600)
    made = _converted(layer)
    made.fit(1, seed=0)
    assert torch.equal(made.down_DN, layer.down_DN)


def test_a_fits_step_is_adams_on_the_gradient_of_the_mean_weighted_squared_error():
    layer = ffn(tokens=200)
    made = _converted(layer)
    layer.weight_T = weight = torch.linspace(0.5, 1.5, 200)
    drift = layer.drift_TD = 0.1 * torch.randn(200, 16)
    made.fit(1, seed=0)
    gate, up, down = (w.double().requires_grad_() for w in (layer.gate_ND, layer.up_ND, layer.down_DN))
    x = layer.x_TD.double()
    h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    coefficient = made.coefficients(layer.x_TD, made.router_ED).double()
    error = (h * coefficient) @ down.T - (h @ down.T).detach() - drift
    (error.square().sum(1) * weight).mean().backward()
    for before, after in [(gate, made.gate_ND), (up, made.up_ND), (down, made.down_DN)]:
        size = gradient_fit.RATE * before.detach().square().mean().sqrt()  # Adam's first step moves by the rate
        clear = before.grad.abs() > 1e-6
        torch.testing.assert_close(
            (after - before)[clear], -size * before.grad.sign()[clear], rtol=1e-2, atol=size.item() * 1e-2
        )


def test_the_same_seed_fits_the_same_bits_and_another_order_gives_others():
    one, two, other = (_fitted(ffn(tokens=1200), passes=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.down_DN, two.down_DN)
    assert torch.equal(one.gate_ND, two.gate_ND)
    assert not torch.equal(one.gate_ND, other.gate_ND)


def _with_massive_tokens(share):
    """A layer that one token in `1 / share` makes put out hundreds of times as much, and the residual that it adds to.

    Such a token has a component of its own, which two neurons answer to.
    """
    layer = ffn(tokens=6000)
    residual = 5 * torch.randn(6000, 16, generator=torch.Generator().manual_seed(5))
    layer.gate_ND[:, 0] = layer.up_ND[:, 0] = 0
    layer.gate_ND[:2, 0] = layer.up_ND[:2, 0] = 30.0
    layer.x_TD[:, 0] = 0
    massive = torch.arange(6000) % round(1 / share) == 0
    layer.x_TD[massive, 0] = 4.0
    return layer, residual, massive


@pytest.mark.parametrize("share", [0.002, 0.01])
def test_a_few_tokens_of_massive_activations_decide_neither_the_routers_choices_nor_its_size(share):
    layer, residual, massive = _with_massive_tokens(share)
    output = layer.dense(layer.x_TD).norm(dim=1)
    assert output[massive].min() > 100 * output[~massive].median()
    layer.weight_T = layer.relative(residual)
    assert layer.weight_T.mean().item() == pytest.approx(1, rel=1e-5)
    share_T = layer.weight_T * output.square()
    assert share_T.max() < 50 * share_T[~massive].mean()  # else 10,000

    ordinary, _, _ = _with_massive_tokens(share)
    ordinary.x_TD = ordinary.x_TD[~massive]
    ordinary.weight_T = ordinary.relative(residual[~massive])
    routers = []
    for some in (layer, ordinary):
        made = _converted(some)
        made.router_ED = router_init.regression(some, EXPERTS[2:])
        made.temper(std=0.02)
        routers.append(made.router_ED)
    chosen = [router_init.chosen(r, ordinary.x_TD, top_k=2)[0].sort(1)[0] for r in routers]
    sizes = [(ordinary.x_TD @ r.T).std(1).mean().item() for r in routers]
    assert (chosen[0] == chosen[1]).float().mean() > 0.8
    assert sizes[0] > 0.2 * sizes[1]


def _all(layer):
    parts = list(layer.chunks())
    yield torch.cat([x for x, _ in parts]), torch.cat([h for _, h in parts])

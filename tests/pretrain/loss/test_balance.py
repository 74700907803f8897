"""The balance losses against their definitions in fp64, transformers, chance, and a batch that is not cut up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from tasks.moe import gate, routing
from tasks.moe.routing import Routed
from tasks.pretrain.loss.balance import Balancer, load
from tests.pretrain import engines
from tests.pretrain.loss.balance_problems import (
    EXPERTS,
    LAYERS,
    TOP_K,
    balancer,
    cut,
    micro_batches,
    params,
    problem,
    real,
    run_rank,
)
from tests.warm_processes import spawn


def mixtral() -> MixtralForCausalLM:
    sizes = {"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    return engines.mixtral(**sizes, initializer_range=0.3, tie_word_embeddings=False)


def reference_switch(routed: list[Routed], real_T: torch.Tensor, logits: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the layers of E sum_e f_e P_e, token by token, over given fp64 logits."""
    losses = []
    for each, logits_TE in zip(routed, logits, strict=True):
        share, probability, tokens = [0.0] * EXPERTS, [torch.zeros(())] * EXPERTS, int(real_T.sum())
        for token in range(len(real_T)):
            if not real_T[token]:
                continue
            for expert in each.chosen_TK[token].tolist():
                share[expert] += 1 / (tokens * TOP_K)
            for expert in range(EXPERTS):
                probability[expert] = probability[expert] + logits_TE[token].softmax(0)[expert] / tokens
        losses.append(EXPERTS * sum(f * p for f, p in zip(share, probability, strict=True)))
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


@given(seed=st.integers(0, 999), padded=st.booleans(), noise=st.booleans())
@settings(deadline=None, max_examples=15)
def test_switch_is_its_formula_and_its_gradient_per_layer_and_averaged(seed: int, padded: bool, noise: bool) -> None:
    routed = problem(seed, tokens=7, noise=noise)
    real_T = real(seed, 7) if padded else None
    part = balancer("switch", coefficient=0.5).losses(routed, real_T=real_T)
    assert part.keys() == {"balance"}
    logits = [each.logits_TE.detach().double().requires_grad_() for each in routed]
    expected = 0.5 * reference_switch(routed, real(seed, 7) if padded else torch.ones(7, dtype=torch.bool), logits)
    torch.testing.assert_close(part["balance"].double(), expected, rtol=1e-5, atol=0)
    result = torch.autograd.grad(part["balance"], [each.logits_TE for each in routed])
    for gradient, wanted in zip(result, torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)


def test_switch_is_1_for_an_even_router_k_times_smaller_than_transformers_and_e_over_k_at_its_worst() -> None:
    made = balancer("switch")
    routed = problem(0, tokens=60)[:1] * LAYERS  # layers that route alike
    theirs = balancer("mixtral").losses(routed, real_T=None)["balance"]
    torch.testing.assert_close(made.losses(routed, real_T=None)["balance"] * TOP_K, theirs)
    chosen_TK = torch.tensor([[t % EXPERTS, (t + 1) % EXPERTS] for t in range(EXPERTS)])
    even = [Routed(**{**vars(routed[0]), "logits_TE": torch.zeros(EXPERTS, EXPERTS), "chosen_TK": chosen_TK})] * LAYERS
    torch.testing.assert_close(made.losses(even, real_T=None)["balance"], torch.tensor(1.0))
    logits_TE = torch.zeros(9, EXPERTS)
    logits_TE[:, :TOP_K] = 90
    collapsed = [
        Routed(**{**vars(routed[0]), "logits_TE": logits_TE, "chosen_TK": torch.arange(TOP_K).expand(9, -1)})
    ] * LAYERS
    torch.testing.assert_close(made.losses(collapsed, real_T=None)["balance"], torch.tensor(EXPERTS / TOP_K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("noise", [False, True])
def test_mixtral_is_the_loss_that_transformers_computes_bit_for_bit(dtype: torch.dtype, noise: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    built = mixtral().to(dtype).train()
    if noise:
        gate.add_noise(built)
    ids = torch.arange(40).view(2, 20)
    with routing.record(built) as routed:
        out = built(input_ids=ids, output_router_logits=True, use_cache=False)
    made = Balancer(params("mixtral", coefficient=1.0), built)
    assert torch.equal(made.losses(routed, real_T=None)["balance"], out.aux_loss)
    real_BL = torch.arange(20).expand(2, -1) < torch.tensor([[20], [13]])
    expected = load_balancing_loss_func(out.router_logits, EXPERTS, TOP_K, real_BL)
    assert torch.equal(made.losses(routed, real_T=real_BL.flatten())["balance"], expected)


@pytest.mark.parametrize("loss", ["switch", "mixtral", "global_batch", "cv2", "bias", "none"])
def test_padding_is_in_no_part_and_in_no_count(loss: str) -> None:
    real_T = real(1, 30)
    routed = problem(1, tokens=30, noise=True)
    kept = [cut(each, real_T) for each in routed]
    padded, alone = (balancer(loss, z_loss=0.1) for _ in range(2))
    result, expected = padded.losses(routed, real_T=real_T), alone.losses(kept, real_T=None)
    assert result.keys() == expected.keys() == ({"z"} if loss in {"bias", "none"} else {"balance", "z"})
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    assert padded.load_LE.tolist() == alone.load_LE.tolist()
    assert (padded.load_LE.sum(1) == int(real_T.sum()) * TOP_K).all()
    for layer, each in enumerate(kept):
        assert padded.load_LE[layer].tolist() == [int((each.chosen_TK == e).sum()) for e in range(EXPERTS)]


@pytest.mark.parametrize("loss", ["switch", "mixtral", "global_batch", "cv2"])
def test_a_micro_batch_of_padding_alone_gives_no_nan(loss: str) -> None:
    parts = balancer(loss, z_loss=0.1).losses(
        problem(1, tokens=5, noise=True), real_T=torch.zeros(5, dtype=torch.bool)
    )
    if loss == "mixtral":  # transformers' own
        del parts["balance"]
    assert all(torch.isfinite(part) for part in parts.values())


def test_the_z_loss_is_the_mean_square_of_the_log_partition_of_the_clean_logits() -> None:
    routed = problem(2, tokens=8, noise=True)
    part = balancer("none", z_loss=0.25).losses(routed, real_T=None)["z"]
    squares = [
        math.log(sum(math.exp(z) for z in row)) ** 2 for each in routed for row in each.clean_TE.double().tolist()
    ]
    assert part.item() == pytest.approx(0.25 * sum(squares) / len(squares), rel=1e-6)
    assert torch.autograd.grad(part, routed[0].clean_TE)[0].abs().sum() > 0


def reference_cv2(each: Routed, *, clean: torch.Tensor, noise: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """cv²(importance) + cv²(load), fp64, expert by expert; the noisy logits are clean + noise * std."""
    noisy = clean + noise * std
    importance, load = [], []
    for expert in range(EXPERTS):
        mine = each.chosen_TK == expert
        importance.append((each.weights_TK.double() * mine).sum())
        others = torch.cat([noisy[:, :expert], noisy[:, expert + 1 :]], dim=1)
        threshold = others.sort(1, descending=True).values[:, TOP_K - 1]
        load.append((0.5 * (1 + torch.erf((clean[:, expert] - threshold) / std[:, expert] / math.sqrt(2)))).sum())
    parts = []
    for values in (importance, load):
        mean = sum(values) / EXPERTS
        parts.append(sum((value - mean) ** 2 for value in values) / (EXPERTS - 1) / mean**2)
    return torch.as_tensor(parts[0] + parts[1])


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=15)
def test_cv2_is_the_papers_formula_summed_over_layers_with_its_gradient_through_clean_logits_and_deviation(
    seed: int,
) -> None:
    routed = problem(seed, tokens=9, noise=True)
    part = balancer("cv2").losses(routed, real_T=None)["balance"]
    leaves, expected = [], torch.zeros((), dtype=torch.float64)
    for each in routed:
        assert each.std_TE is not None
        clean, std = (part.detach().double().requires_grad_() for part in (each.clean_TE, each.std_TE))
        noise = (each.logits_TE.detach().double() - clean.detach()) / std.detach()
        expected = expected + reference_cv2(each, clean=clean, noise=noise, std=std)
        leaves += [clean, std]
    torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-6)
    # the importance's share of the gradient goes through the weights, which the reference takes as given
    live = [leaf for each in routed for leaf in (each.clean_TE, each.std_TE)]
    for each in routed:
        weights = torch.autograd.grad(part, each.weights_TK, retain_graph=True)[0]
        assert weights.abs().sum() > 0
    frozen = [Routed(**{**vars(each), "weights_TK": each.weights_TK.detach()}) for each in routed]
    part = balancer("cv2").losses(frozen, real_T=None)["balance"]
    for gradient, wanted in zip(torch.autograd.grad(part, live), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-4)


def test_load_is_how_often_a_token_has_the_expert_when_its_own_noise_is_drawn_again() -> None:
    draws, tokens = 4000, 5
    each = problem(3, tokens=tokens, noise=True)[0]
    assert each.std_TE is not None
    clean, std, noisy = each.clean_TE.detach(), each.std_TE.detach(), each.logits_TE.detach()
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(EXPERTS)
    for expert in range(EXPERTS):
        again = noisy.expand(draws, -1, -1).clone()
        fresh = torch.randn(draws, tokens, generator=generator)
        again[:, :, expert] = clean[:, expert] + std[:, expert] * fresh
        kept[expert] = (again.topk(TOP_K, dim=2).indices == expert).any(2).float().mean(0).sum()
    result = load(each, torch.zeros(EXPERTS, dtype=torch.int64), real_T=None)
    torch.testing.assert_close(result, kept, atol=5 * math.sqrt(tokens * 0.25 / draws), rtol=0)
    wrong = noisy - clean > noisy.topk(TOP_K + 1, dim=1).values[:, -1:]  # upstream's comparison would take another
    assert (wrong != torch.zeros_like(wrong).scatter(1, each.chosen_TK, True)).any()


def test_cv2_takes_counts_without_noise_and_where_every_expert_is_chosen() -> None:
    quiet = problem(4, tokens=20)
    part = balancer("cv2").losses(quiet, real_T=None)["balance"]
    expected = 0.0
    for each in quiet:
        importance = [float(each.weights_TK.detach()[each.chosen_TK == e].sum()) for e in range(EXPERTS)]
        counts = [float((each.chosen_TK == e).sum()) for e in range(EXPERTS)]
        for values in (importance, counts):
            mean = sum(values) / EXPERTS
            expected += sum((value - mean) ** 2 for value in values) / (EXPERTS - 1) / mean**2
    assert part.item() == pytest.approx(expected, rel=1e-5)
    full = problem(4, tokens=20, noise=True, top_k=EXPERTS)
    part = balancer("cv2", top_k=EXPERTS).losses(full, real_T=None)["balance"]
    weights = [torch.zeros(20, EXPERTS).scatter(1, each.chosen_TK, each.weights_TK).sum(0) for each in full]
    torch.testing.assert_close(part, sum(value.var() / value.mean() ** 2 for value in weights), rtol=1e-4, atol=1e-6)


def test_global_batch_takes_the_shares_of_all_micro_batches_so_far_and_begins_anew_with_each_step() -> None:
    made = balancer("global_batch")
    first, second = problem(5, tokens=6), problem(6, tokens=10)
    for _ in range(2):
        made.begin()
        one = made.losses(first, real_T=None)["balance"]
        two = made.losses(second, real_T=None)["balance"]
        torch.testing.assert_close(one, balancer("switch").losses(first, real_T=None)["balance"])
        expected = 0.0
        for a, b in zip(first, second, strict=True):
            chosen = torch.cat([a.chosen_TK, b.chosen_TK])
            share = torch.tensor([float((chosen == e).sum()) for e in range(EXPERTS)]) / chosen.numel()
            expected += float(EXPERTS * (share * b.logits_TE.detach().softmax(1).mean(0)).sum()) / LAYERS
        assert two.item() == pytest.approx(expected, rel=1e-5)
        assert (made.load_LE.sum(1) == 16 * TOP_K).all()


def test_over_two_processes_the_mean_is_the_loss_of_the_whole_batch_and_both_move_the_biases_alike(
    tmp_path: Path,
) -> None:
    spawn(run_rank, (str(tmp_path),))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["reductions"].tolist() == [[LAYERS, EXPERTS]] * 2  # all layers of a micro-batch at once
    assert one["reductions of the bias"].tolist() == [[LAYERS, EXPERTS]]  # and once for all micro-batches
    alone, losses, gradients = balancer("global_batch"), [], []  # one process that has both halves
    mover = balancer("bias", coefficient=0.1)
    for routed, real_T in micro_batches():
        losses.append(alone.losses(routed, real_T=real_T)["balance"])
        gradients += torch.autograd.grad(losses[-1], [each.logits_TE for each in routed])
        mover.losses(routed, real_T=real_T)
    mover.end()
    torch.testing.assert_close(one["losses"], torch.stack(losses).detach())
    torch.testing.assert_close(one["gradients"], torch.stack(gradients))
    whole, real_T = micro_batches()[0]
    torch.testing.assert_close(losses[0], balancer("switch").losses(whole, real_T=real_T)["balance"])
    assert one["biases"].tolist() == two["biases"].tolist() == gate.biases(mover.model)
    assert (one["load"] + two["load"]).tolist() == mover.load_LE.tolist()


def test_a_bias_moves_by_u_towards_the_mean_and_stays_centred_and_a_step_given_up_moves_nothing() -> None:
    made = balancer("bias", coefficient=0.125)
    each = problem(0, tokens=4)[0]
    crowded = Routed(**{**vars(each), "chosen_TK": torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])})
    made.begin()
    made.losses([crowded] * LAYERS, real_T=None)
    made.begin()  # without an end
    assert not torch.tensor(gate.biases(made.model)).any()
    made.losses([crowded] * LAYERS, real_T=None)
    made.end()
    down, up = -0.125, 0.125  # of counts 4 2 1 1 0 0 and their mean 1.33
    moved = torch.tensor([down, down, up, up, up, up])
    assert gate.biases(made.model) == [(moved - moved.mean()).tolist()] * LAYERS


def test_a_bias_evens_out_the_load_of_a_router_that_prefers_two_experts() -> None:
    torch.manual_seed(0)
    built = mixtral().train()
    x_BLD = torch.randn(1, 400, 16)
    x_BLD[..., 0] = 3
    with torch.no_grad():
        for router in routing.routers(built):
            router.weight.normal_(std=0.3)
            router.weight[:, 0] = torch.tensor([0.5, 0.4, 0.0, 0.0, -0.3, -0.5])  # + 3 x that
    gate.add_bias(built)
    made = Balancer(params("bias", coefficient=0.05), built)
    crowded = []
    for _ in range(60):
        made.begin()
        with torch.no_grad(), routing.record(built) as routed:
            for router in routing.routers(built):
                router(x_BLD)
        made.losses(routed, real_T=None)
        made.end()
        crowded.append(float((made.load_LE.max(1) / made.load_LE.mean(1)).max()))
    assert crowded[0] > 2
    assert max(crowded[-10:]) < 1.15


def test_without_a_loss_tokens_are_counted_all_the_same_and_a_dense_model_has_nothing_to_balance() -> None:
    made = balancer("none")
    made.begin()
    assert made.losses(problem(0, tokens=5), real_T=None) == {}
    made.end()
    assert made.load_LE.sum() == LAYERS * 5 * TOP_K
    made.begin()
    assert made.load_LE.sum() == 0
    dense = Balancer(
        params("switch"),
        LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        ),
    )
    assert dense.losses([], real_T=None) == {}
    assert dense.load_LE.shape == (0, 0)

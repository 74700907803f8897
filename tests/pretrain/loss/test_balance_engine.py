"""Noisy and biased routers with their balance losses under DeepSpeed, however weights and activations are kept."""

from __future__ import annotations

import pytest
import torch

from tasks.moe import gate, routing
from tasks.moe.internals import layers
from tasks.pretrain.engine import interface
from tasks.pretrain.loss.balance import Balancer
from tasks.settings import Pretrain
from tests.pretrain.engines import mixtral

pytestmark = pytest.mark.usefixtures("process_group")


def train(
    *, balance: dict[str, object], stage: int, dtype: torch.dtype, checkpointing: bool
) -> tuple[list[list[float]], dict[str, torch.Tensor], list[list[float]]]:
    """Three steps of two micro-batches: the losses of each, the final weights and biases."""
    params = Pretrain(
        tokens=4096, seq_len=16, batch=4, micro_batch=2, zero_stage=stage, learning_rate=1e-2, balance=balance,
        noise=balance["loss"] != "bias",
    )  # fmt: skip
    model = mixtral(dtype, tie_word_embeddings=False)
    if params.noise:
        gate.add_noise(model)
    else:
        gate.add_bias(model)
    if checkpointing:
        layers.recompute_activations(model)
    built = interface.build(model, params)
    balancer = Balancer(params, built.module)
    torch.manual_seed(1)
    losses = []
    for step in range(3):
        balancer.begin()
        for micro in range(2):
            ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2 * step + micro))
            with routing.record(built.module) as routed:
                loss = built(input_ids=ids, labels=ids, use_cache=False).loss
            parts = balancer.losses(routed, real_T=None)
            losses.append([loss.item(), *(part.item() for part in parts.values())])
            built.backward(loss + sum(parts.values()))
            if micro == 0:
                built.next_micro_batch()
        assert built.finish_step() > 0
        balancer.end()
        assert (balancer.load_LE.sum(1) == 2 * 32 * 2).all()
    weights = built.full_weights()
    assert weights is not None
    return losses, weights, gate.biases(built.module)


BALANCES = [
    pytest.param({"loss": "cv2", "coefficient": 0.1, "z_loss": 0.01}, id="cv2"),
    pytest.param({"loss": "bias", "coefficient": 0.01}, id="bias"),
]


@pytest.mark.parametrize("balance", BALANCES)
def test_zero_3_with_gradient_checkpointing_trains_as_zero_1_without(balance: dict[str, object]) -> None:
    losses, weights, biases = train(balance=balance, stage=1, dtype=torch.float32, checkpointing=False)
    result, others, moved = train(balance=balance, stage=3, dtype=torch.float32, checkpointing=True)
    torch.testing.assert_close(torch.tensor(result), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    assert weights.keys() == others.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(others[name], expected, rtol=1e-4, atol=1e-5)
    assert moved == biases
    if balance["loss"] == "bias":
        assert torch.tensor(biases).abs().max() > 0.005
        assert (torch.tensor(biases).mean(1).abs() < 1e-6).all()
    else:
        assert len(losses[0]) == 3
        noise = [value for name, value in weights.items() if "noise" in name]
        assert len(noise) == 2
        assert all(value.abs().max() > 1e-3 for value in noise)


@pytest.mark.parametrize("balance", BALANCES)
def test_in_half_precision_gradient_checkpointing_changes_no_bit(balance: dict[str, object]) -> None:
    losses, weights, biases = train(balance=balance, stage=3, dtype=torch.bfloat16, checkpointing=False)
    result, others, moved = train(balance=balance, stage=3, dtype=torch.bfloat16, checkpointing=True)
    assert (result, moved) == (losses, biases)
    assert all(torch.equal(others[name], expected) for name, expected in weights.items())

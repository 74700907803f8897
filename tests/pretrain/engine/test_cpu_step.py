"""The optimizer step that stands in for ZeRO 1's on a CPU: against DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tasks.pretrain.engine import cpu_step
from tasks.pretrain.engine.interface import Engine
from tasks.settings import Pretrain
from tests.pretrain.engines import build, settings, states, train

PHASES = [{"what": "router", "tokens": 128}, {"what": "all"}]


def pair(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, params: Pretrain) -> Iterator[Engine]:
    """An engine with DeepSpeed's own step, then one with ours."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu_step, "install", lambda engine: None)
        yield build(params, dtype=dtype)
    yield build(params, dtype=dtype)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("piece", [7, 1 << 19], ids=["pieces", "whole"])
def test_weights_moments_and_norms_are_those_of_deepspeeds_step(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(cpu_step, "PIECE", piece)
    params = settings(zero_stage=1, micro_batch=4, clip=0.5, weight_decay=0.3, train=PHASES)
    results = []
    for engine in pair(monkeypatch, dtype, params):
        norms: list[float] = []
        losses = train(engine, range(4), params=params, norms=norms)  # two steps of each phase
        results.append((states(engine), torch.tensor(norms), torch.tensor(losses)))
    (theirs, their_norms, their_losses), (ours, our_norms, our_losses) = results
    assert (their_norms > params.clip).any(), "nothing was clipped"
    off = 1e-5 if dtype == torch.float32 else 2e-3  # a weight that is rounded to the other neighbour moves them
    torch.testing.assert_close(our_norms, their_norms, rtol=off, atol=0)
    torch.testing.assert_close(our_losses, their_losses, rtol=off, atol=0)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= off * value.norm(), name


@pytest.mark.usefixtures("process_group")
def test_a_process_that_is_alone_copies_no_gradient_into_a_bucket() -> None:
    engine = build(settings(zero_stage=1, micro_batch=4), dtype=torch.bfloat16)
    train(engine, range(1))
    zero = engine.deepspeed.optimizer
    assert all(buffer.numel() <= 1 for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer)
    assert zero.grads_in_partition is None


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("fields", [{"zero_stage": 2}, {"zero_stage": 1, "offload": True}], ids=["zero2", "offload"])
def test_other_optimizers_keep_their_own_step(fields: dict[str, object]) -> None:
    zero = build(settings(**fields), dtype=torch.bfloat16).deepspeed.optimizer
    assert "step" not in vars(zero)

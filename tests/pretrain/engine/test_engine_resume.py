"""Engine, checkpoint and full weights together, in one process, for every ZeRO stage and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.moe import gate
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.engine import interface
from tasks.pretrain.engine.interface import Engine
from tasks.settings import Pretrain
from tests.pretrain.engines import mixtral, train_step

pytestmark = pytest.mark.usefixtures("process_group")


def build(params: Pretrain, dtype: torch.dtype) -> Engine:
    model = mixtral(dtype, output_router_logits=True)
    gate.swap_in(model, {layer: gate.start(4, 16, seed=0, layer=layer) for layer in range(2)})
    return interface.build(model.train(), params)  # with noise


def train(built: Engine, steps: range, *, params: Pretrain) -> list[list[float]]:
    losses = []
    for step in steps:
        built.set_rates(step=step + 1, params=params)
        made, norm = train_step(built, step)
        losses.append(made)
        assert 0 < norm < 100
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_restored_engine_goes_on_bit_for_bit_and_hands_out_its_fp32_masters(
    tmp_path: Path, stage: int, dtype: torch.dtype
) -> None:
    params = Pretrain.model_validate(
        {
            "tokens": 320, "seq_len": 16, "batch": 4, "micro_batch": 2, "zero_stage": stage, "learning_rate": 1e-2,
            # the checkpoint is in the first phase, and the second begins behind it
            "train": [{"what": "router", "tokens": 192}, {"what": "all"}],
        }
    )  # fmt: skip
    built = build(params, dtype)
    train(built, range(2), params=params)
    checkpoints = CheckpointManager(tmp_path, params=params, rank=0, world_size=1)
    checkpoints.save(built, state={"step": 2})
    checkpoints.finish()
    expected = train(built, range(2, 5), params=params)
    masters = built.full_weights()

    other = build(params, dtype)
    result = checkpoints.latest()
    assert result is not None
    checkpoints.restore(other, result)
    assert train(other, range(2, 5), params=params) == expected
    restored = other.full_weights()
    built.discard_step()
    checkpoints.restore(built, result)  # as a rollback does, from another phase
    assert train(built, range(2, 5), params=params) == expected
    assert masters is not None
    assert restored is not None
    assert masters.keys() == restored.keys() == {name for name, _ in built.module.named_parameters()}
    for name, tensor in masters.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, restored[name])
    shapes = {tuple(tensor.shape) for tensor in masters.values()}
    assert (4, 16, 16) in shapes  # whole experts, in every stage
    finer = [bool((tensor != tensor.bfloat16().float()).any()) for tensor in masters.values()]
    assert any(finer)
    gates, fresh = gate.take_out(masters), gate.start(4, 16, seed=0, layer=1)
    assert len(gates) == 2
    for name in ("inner_ED", "outer_EE", "noise_ED"):
        assert (getattr(gates[1], name) - getattr(fresh, name)).abs().max() > 1e-4  # it was trained

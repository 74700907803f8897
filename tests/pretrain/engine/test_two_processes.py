"""The same training by one process and by two gloo processes, in every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.pretrain.engine import distributed
from tasks.settings import Pretrain
from tests.pretrain.engines import build
from tests.pretrain.engines import settings as any_settings
from tests.warm_processes import spawn_ranks

STAGES = (0, 1, 2, 3)
STEPS = 4


def settings(stage: int, *, processes: int) -> Pretrain:
    """Four windows a step, one at a time: two processes accumulate two of them each; every step is clipped."""
    phases = [{"what": "router", "tokens": 64}, {"what": "all"}]
    return any_settings(
        zero_stage=stage, processes=processes, micro_batch=1, clip=0.2, train=phases, learning_rate=3e-3
    )


def run(stage: int, *, rank: int, world_size: int) -> dict[str, Any]:
    """Losses of this rank's windows, gradient norms, and on rank 0 the last masters."""
    params = settings(stage, processes=world_size)
    built = build(params, world_size=world_size)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        built.set_rates(step=step, params=params)
        ids = torch.randint(64, (params.batch, params.seq_len), generator=torch.Generator().manual_seed(step))
        if step == 3:  # given up by both, after the first of its micro-batches
            built.backward(built(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss)
            built.discard_step()
        for window in ids[rank::world_size].split(1):
            loss = built(input_ids=window, labels=window).loss
            built.backward(loss)
            losses.append(loss.item())
            if len(losses) % built.deepspeed.gradient_accumulation_steps():
                built.next_micro_batch()
        norms.append(built.finish_step())
    return {"losses": losses, "norms": norms, "weights": built.full_weights()}


def member(rank: int, folder: Path) -> None:
    """One of two processes: all stages, one after the other."""
    distributed.join(folder)
    for stage in STAGES:
        torch.save(run(stage, rank=rank, world_size=2), folder / f"zero-{stage}-rank-{rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("pair")
    spawn_ranks(member, (folder,))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[str, Any]]]:
    """What one process does, by stage."""
    distributed.join(tmp_path_factory.mktemp("alone"))
    yield {stage: run(stage, rank=0, world_size=1) for stage in STAGES}
    distributed.leave()


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_have_the_losses_norms_and_weights_of_one(
    pair: Path, alone: dict[int, dict[str, Any]], stage: int
) -> None:
    ranks = [torch.load(pair / f"zero-{stage}-rank-{rank}.pt") for rank in range(2)]
    losses = torch.tensor([rank["losses"] for rank in ranks]).T.flatten()  # in the order of the windows
    expected = alone[stage]
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
    assert ranks[0]["norms"] == ranks[1]["norms"]
    assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert ranks[1]["weights"] is None
    assert ranks[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=2e-5, msg=name)
    assert len({round(loss, 4) for loss in expected["losses"]}) == 4 * STEPS  # each window is another
    assert min(expected["norms"][1:]) > 0.2  # clipped

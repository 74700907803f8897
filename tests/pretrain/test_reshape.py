"""1 -> 2 -> 1 processes in every ZeRO stage: two processes of one test, and one before and behind them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.pretrain import engine, reshape
from tasks.pretrain.checkpoint import Checkpoints
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

from .engines import build, states, train
from .engines import settings as any_settings

STAGES = (0, 1, 2, 3)


def settings(stage: int, *, processes: int = 1) -> Pretrain:
    """Two steps of the routers alone, then all: the groups' counts of steps differ."""
    phases = [{"what": "router", "tokens": 128}, {"what": "all"}]
    return any_settings(zero_stage=stage, processes=processes, train=phases)


def folder(root: Path, stage: int, *, written_by: int) -> Path:
    return root / f"zero-{stage}-by-{written_by}"


def take_up(root: Path, stage: int, *, written_by: int, rank: int, world_size: int) -> tuple[Any, dict[str, Any]]:
    """An engine of this world size that goes on from the checkpoint of the other one."""
    params = settings(stage, processes=world_size)
    built = build(params, world_size=world_size)
    checkpoints = Checkpoints(
        folder(root, stage, written_by=written_by), params=params, rank=rank, world_size=world_size
    )
    found = checkpoints.latest()
    assert found is not None
    assert found["world_size"] == written_by
    checkpoints.restore(built, found)
    return built, found


def save(built: engine.DeepSpeedEngine, root: Path, *, stage: int, step: int, rank: int, world_size: int) -> None:
    params = settings(stage, processes=world_size)
    checkpoints = Checkpoints(
        folder(root, stage, written_by=world_size), params=params, rank=rank, world_size=world_size
    )
    checkpoints.save(built, state={"step": step})
    checkpoints.finish()
    assert sorted(path.name for path in checkpoints.folder.glob("*step*")) == [f"step-{step:08}"]


def second(rank: int, root: Path, port: int) -> None:
    """One of two processes: steps 2 and 3 of each stage."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    engine.initialise(root)
    for stage in STAGES:
        built, _ = take_up(root, stage, written_by=1, rank=rank, world_size=2)
        drawn = torch.rand(1).item()
        found: dict[str, Any] = {"taken up": states(built) if stage else None, "drawn": drawn}
        found["losses"] = train(built, range(2, 4), params=settings(stage), rank=rank, world_size=2)
        found["left"] = states(built)
        torch.save(found, root / f"zero-{stage}-rank-{rank}.pt")
        save(built, root, stage=stage, step=4, rank=rank, world_size=2)
    engine.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, dict[str, Any]]]:
    """By stage: what the run saw at the two changes, beside one that never changed."""
    root = tmp_path_factory.mktemp("reshape")
    engine.initialise(root)
    found: dict[int, dict[str, Any]] = {}
    for stage in STAGES:
        params = settings(stage)
        built = build(params)
        train(built, range(2), params=params)
        found[stage] = {"left by 1": states(built)}
        save(built, root, stage=stage, step=2, rank=0, world_size=1)
        found[stage]["unchanged"] = train(built, range(2, 6), params=params)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(second, (root, port), nprocs=2, start_method="spawn")
    for stage in STAGES:
        ranks = [torch.load(root / f"zero-{stage}-rank-{rank}.pt") for rank in range(2)]
        built, _ = take_up(root, stage, written_by=2, rank=0, world_size=1)
        found[stage] |= {
            "ranks": ranks,
            "taken up by 1": states(built) if stage else None,
            "drawn": torch.rand(1).item(),
        }
        found[stage]["last"] = train(built, range(4, 6), params=settings(stage))
    yield found
    engine.close()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_masters_and_moments_pass_both_changes_bit_for_bit(runs: dict[int, dict[str, Any]], stage: int) -> None:
    run = runs[stage]
    for before, after in [
        (run["left by 1"], run["ranks"][0]["taken up"]),
        (run["ranks"][0]["left"], run["taken up by 1"]),
    ]:
        assert before.keys() == after.keys()
        assert len(before) > 30
        for name, tensor in before.items():
            assert torch.equal(tensor.flatten(), after[name].flatten()), name
        assert any(tensor.any() for name, tensor in after.items() if name.endswith("exp_avg_sq"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_go_on_as_if_nothing_had_changed(runs: dict[int, dict[str, Any]], stage: int) -> None:
    run = runs[stage]
    mean = torch.tensor([rank["losses"] for rank in run["ranks"]]).mean(0)  # of two ranks' windows, a step
    alone = torch.tensor(run["unchanged"]).view(-1, 2).mean(1)
    torch.testing.assert_close(mean, alone[:2], rtol=2e-5, atol=0)
    torch.testing.assert_close(torch.tensor(run["last"]).view(-1, 2).mean(1), alone[2:], rtol=2e-5, atol=0)
    assert alone[0] != alone[3]


def test_random_states_start_anew_for_each_rank_and_the_same_in_every_stage(runs: dict[int, dict[str, Any]]) -> None:
    drawn = {(rank, run["ranks"][rank]["drawn"]) for run in runs.values() for rank in range(2)}
    assert len(drawn) == len({value for _, value in drawn}) == 2
    assert len({run["drawn"] for run in runs.values()}) == 1


def test_what_would_go_on_from_wrong_states_is_refused_with_the_number_to_set(tmp_path: Path) -> None:
    params = any_settings(zero_stage=3, expert_parallel=2, processes=4, batch=8)
    with pytest.raises(TrainingError, match=r"by 2 processes and pretrain.processes is 4 now.*Set .* to 2"):
        reshape.across(None, tmp_path, state={"step": 2, "world_size": 2}, params=params, rank=0)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    with pytest.raises(TrainingError, match="step-00000002 could not be converted"):
        reshape.convert(tmp_path / "step-00000002", tmp_path / ".tmp-universal")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]

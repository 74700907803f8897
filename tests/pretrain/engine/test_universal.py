"""1 -> 2 -> 1 processes in every ZeRO stage: two processes of one test, and one before and behind them.

In bfloat16 the number of micro-batches makes DeepSpeed take another optimizer for ZeRO-1, too: 2 before, 1 with both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tasks.pretrain.checkpoints import manager
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.engine import checkpoint_writer, distributed, universal
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.job import TrainingError
from tasks.scratch import write_json
from tasks.settings import Pretrain
from tests.pretrain.engines import build, micro_loss, states, train
from tests.pretrain.engines import settings as any_settings
from tests.warm_processes import spawn_ranks

CASES = {
    "zero-0": (0, torch.float32),
    "zero-1": (1, torch.float32),
    "zero-2": (2, torch.float32),
    "zero-3": (3, torch.float32),
    "zero-1-bf16": (1, torch.bfloat16),
}


def settings(case: str, *, processes: int = 1) -> Pretrain:
    """Two steps of the routers alone, then all: the groups' counts of steps differ."""
    phases = [{"what": "router", "tokens": 128}, {"what": "all"}]
    return any_settings(zero_stage=CASES[case][0], processes=processes, train=phases, clip=0.2)


def folder(root: Path, case: str, *, written_by: int) -> Path:
    return root / f"{case}-by-{written_by}"


def resume(root: Path, case: str, *, written_by: int, rank: int, world_size: int) -> tuple[Any, dict[str, Any]]:
    """An engine of this world size that goes on from the checkpoint of the other one."""
    params = settings(case, processes=world_size)
    built = build(params, world_size=world_size, dtype=CASES[case][1])
    checkpoints = CheckpointManager(
        folder(root, case, written_by=written_by), params=params, rank=rank, world_size=world_size
    )
    result = checkpoints.latest()
    assert result is not None
    assert result["world_size"] == written_by
    assert (result["optimizer"] == type(built.deepspeed.optimizer).__name__) == (case != "zero-1-bf16")
    checkpoints.restore(built, result)
    return built, result


def save(built: Engine, root: Path, *, case: str, step: int, rank: int, world_size: int) -> None:
    params = settings(case, processes=world_size)
    checkpoints = CheckpointManager(
        folder(root, case, written_by=world_size), params=params, rank=rank, world_size=world_size
    )
    checkpoints.save(built, state={"step": step})
    checkpoints.finish()
    assert sorted(path.name for path in checkpoints.folder.glob("*step*")) == [f"step-{step:08}"]


def second(rank: int, root: Path) -> None:
    """One of two processes: steps 2 and 3 of each stage."""
    distributed.join(root)
    for case in CASES:
        built, _ = resume(root, case, written_by=1, rank=rank, world_size=2)
        drawn = torch.rand(1).item()
        result: dict[str, Any] = {"resumed": states(built) if case != "zero-0" else None, "drawn": drawn}
        built.backward(micro_loss(built, 50, rank))  # a step that both give up
        built.discard_step()
        result["norms"] = []
        result["losses"] = train(
            built, range(2, 4), params=settings(case), rank=rank, world_size=2, norms=result["norms"]
        )
        assert (built.full_weights() is None) == (rank == 1)
        result["left"] = states(built)
        torch.save(result, root / f"{case}-rank-{rank}.pt")
        save(built, root, case=case, step=4, rank=rank, world_size=2)
    torch.save(failure(built, root, rank=rank), root / f"failure-{rank}.pt")
    distributed.leave()


def failure(built: Engine, root: Path, *, rank: int) -> dict[str, Any]:
    """What each rank is told when the disk of one is full, and what is left."""
    checkpoints = CheckpointManager(root / "full", params=settings("zero-1", processes=2), rank=rank, world_size=2)
    checkpoints.save(built, state={"step": 2})
    checkpoints.finish()
    told = []
    for files, markers in [(0, None), (1, None), (None, 1)]:  # whose disk is full, and for what
        with (
            mock.patch.object(checkpoint_writer.torch, "save", full if rank == files else torch.save),
            mock.patch.object(manager.scratch, "write_json", full if rank == markers else slow),
        ):
            checkpoints.save(built, state={"step": 4})
            try:
                checkpoints.finish()
            except TrainingError as error:
                told.append(str(error))
    torch.distributed.barrier()
    return {"told": told, "left": sorted(path.name for path in checkpoints.folder.glob("*step*"))}


def full(*_: Any) -> None:
    raise OSError("No space left on device")


def slow(path: Path, content: Any) -> None:
    time.sleep(0.5)  # it comes after the other rank's failure
    write_json(path, content)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """By case: what the run saw at the two changes, beside one that never changed."""
    root = tmp_path_factory.mktemp("reshape")
    distributed.join(root)
    result: dict[str, dict[str, Any]] = {}
    for case in CASES:
        params = settings(case)
        built = build(params, dtype=CASES[case][1])
        train(built, range(2), params=params)
        result[case] = {"left by 1": states(built)}
        save(built, root, case=case, step=2, rank=0, world_size=1)
        result[case]["norms"] = []
        result[case]["unchanged"] = train(built, range(2, 6), params=params, norms=result[case]["norms"])
    spawn_ranks(second, (root,))
    result["failure"] = {f"rank {rank}": torch.load(root / f"failure-{rank}.pt") for rank in range(2)}
    for case in CASES:
        ranks = [torch.load(root / f"{case}-rank-{rank}.pt") for rank in range(2)]
        built, _ = resume(root, case, written_by=2, rank=0, world_size=1)
        result[case] |= {
            "ranks": ranks,
            "resumed by 1": states(built) if case != "zero-0" else None,
            "drawn": torch.rand(1).item(),
        }
        result[case]["last"] = train(built, range(4, 6), params=settings(case))
    yield result
    distributed.leave()


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_masters_and_moments_pass_both_changes_bit_for_bit(runs: dict[str, dict[str, Any]], case: str) -> None:
    run = runs[case]
    for before, after in [
        (run["left by 1"], run["ranks"][0]["resumed"]),
        (run["ranks"][0]["left"], run["resumed by 1"]),
    ]:
        assert before.keys() == after.keys()
        assert len(before) > 30
        for name, tensor in before.items():
            assert torch.equal(tensor.flatten(), after[name].flatten()), name
        assert any(tensor.any() for name, tensor in after.items() if name.endswith("exp_avg_sq"))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_go_on_as_if_nothing_had_changed(runs: dict[str, dict[str, Any]], case: str) -> None:
    run = runs[case]
    mean = torch.tensor([rank["losses"] for rank in run["ranks"]]).mean(0)  # of two ranks' windows, a step
    alone = torch.tensor(run["unchanged"]).view(-1, 2).mean(1)
    rtol = 2e-5 if CASES[case][1] == torch.float32 else 2e-3
    torch.testing.assert_close(mean, alone[:2], rtol=rtol, atol=0)
    torch.testing.assert_close(torch.tensor(run["last"]).view(-1, 2).mean(1), alone[2:], rtol=rtol, atol=0)
    assert alone[0] != alone[3]
    assert run["ranks"][0]["norms"] == run["ranks"][1]["norms"]
    assert run["ranks"][0]["norms"] == pytest.approx(
        run["norms"][:2], rel=1e-4 if CASES[case][1] == torch.float32 else 2e-2
    )
    assert min(run["norms"]) > 0.2  # clipped


def test_random_states_start_anew_for_each_rank_and_the_same_in_every_stage(runs: dict[str, dict[str, Any]]) -> None:
    drawn = {(rank, runs[case]["ranks"][rank]["drawn"]) for case in CASES for rank in range(2)}
    assert len(drawn) == len({value for _, value in drawn}) == 2
    assert len({runs[case]["drawn"] for case in CASES}) == 1


def test_all_ranks_hear_of_the_full_disk_of_one_and_nothing_half_is_left(runs: dict[str, dict[str, Any]]) -> None:
    for result in runs["failure"].values():
        assert result["left"] == ["step-00000002"]
        assert len(result["told"]) == 3
        for message in result["told"]:
            assert "step 4 could not be written" in message
            assert "No space left on device" in message
            assert "step 2 is whole" in message


def test_another_precision_is_refused_with_the_one_to_set(tmp_path: Path, runs: dict[str, dict[str, Any]]) -> None:
    checkpoints = CheckpointManager(tmp_path, params=any_settings(), rank=0, world_size=1)
    built = build(any_settings())
    state = {"step": 2, "world_size": 1, "optimizer": "any", "dtype": "bfloat16"}
    with pytest.raises(
        TrainingError, match=r"written in bfloat16.*precision = auto is float32.*set precision: bfloat16"
    ):
        checkpoints.restore(built, state)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    with pytest.raises(TrainingError, match="step-00000002 could not be converted"):
        universal.convert(tmp_path / "step-00000002", tmp_path / ".tmp-universal")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import scratch
from tasks.pretrain import checkpoint
from tasks.pretrain.job import TrainingError


def written(folder: Path, step: int) -> str:
    tag = f"step-{step:08}"
    scratch.write_json(folder / tag / "state.json", {"step": step, "world_size": 2})
    return tag


def test_only_what_the_pointer_names_is_found_and_a_crashed_save_is_swept_away(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None
    tags = [written(tmp_path, step) for step in (2, 4, 6)]
    scratch.write_json(tmp_path / "latest.json", {"tag": tags[1]})  # killed between the rename of 6 and the pointer
    (tmp_path / ".tmp-step-00000008").mkdir()
    checkpoint.clean(tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", *tags[:2]]


def test_another_number_of_processes_is_refused_with_both_numbers() -> None:
    checkpoint.check_world_size({"step": 4, "world_size": 2}, 2)
    with pytest.raises(TrainingError, match=r"written by 2 processes.* is 4 now.*Set pretrain.processes to 2"):
        checkpoint.check_world_size({"step": 4, "world_size": 2}, 4)


def test_random_states_survive_json_bit_for_bit() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(), *np.random.randn(3).tolist(), *torch.randn(3).tolist()]

    random.gauss()  # leaves a second value cached
    np.random.randn()
    saved = json.loads(json.dumps(checkpoint._rng_state()))
    expected = draw()
    checkpoint._set_rng_state(saved)
    assert draw() == expected

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.pretrain import log
from tasks.pretrain.job import TrainingError


def step(number: int) -> log.Record:
    values = {"loss": 1.5, "balance": 4.0, "grad_norm": 0.5, "lr": 1e-3, "timing": {"seconds": 2.0}}
    return {"kind": "step", "step": number, "tokens": number * 8, **values}


def test_reopening_drops_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    first = log.Log(tmp_path, offset=0, step=0)
    first.write(step(1))
    offset = first.sync()
    first.write(step(2))
    first.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')  # killed in the middle of a line
    again = log.Log(tmp_path, offset=offset, step=1)
    again.write(step(2))
    again.close()
    assert [record["step"] for record in log.read(tmp_path / "log.jsonl", "step")] == [1, 2]


def test_a_log_shorter_than_the_checkpoint_remembers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has 0 bytes, but was 100 long"):
        log.Log(tmp_path, offset=100, step=2)


def test_csv_columns_are_step_tokens_and_then_the_values() -> None:
    assert log.loss_csv([step(3)]) == "step,tokens,loss,balance,grad_norm,lr\n3,24,1.5,4.0,0.5,0.001\n"
    heldout = {"kind": "heldout", "step": 0, "tokens": 0, "mean": 2.0, "losses": {"b": 1.0, "a": 3.0}}
    assert log.heldout_csv([heldout]) == "step,tokens,mean,b,a\n0,0,2.0,1.0,3.0\n"

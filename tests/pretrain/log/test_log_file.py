"""The log: what it keeps, what it drops on resume, and what it tells the trackers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pretrain.job import TrainingError
from tasks.pretrain.log import log_file, trackers


class Remembering:
    """A tracker that remembers all its runs together, as MLflow does; its subclass rewinds, as TensorBoard does."""

    rewinds = False

    def __init__(self, points: list[tuple[int, dict[str, float]]], step: int) -> None:
        self.points = points
        if self.rewinds:
            self._drop(step or -1)  # from the start, the evaluation before the first step comes again too

    def _drop(self, step: int) -> None:
        self.points[:] = [point for point in self.points if point[0] <= step]

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.points.append((step, dict(numbers)))

    def rewind(self, step: int) -> None:
        if self.rewinds:
            self._drop(step)

    def flush(self) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Rewinding(Remembering):
    rewinds = True


def a_run(folder: Path) -> trackers.Run:
    return trackers.Run(folder=folder, name="demo", key="demo-1", config={})


def opened(folder: Path, *, offset: int = 0, step: int = 0) -> log_file.LogFile:
    return log_file.LogFile(a_run(folder), names=[], offset=offset, step=step)


def step(number: int, loss: float = 1.5) -> log_file.Record:
    values = {"loss": loss, "parts": {"balance": 0.25}, "total": loss + 0.25, "grad_norm": 0.5, "lr": 1e-3}
    return {"kind": "step", "step": number, "tokens": number * 8, **values, "timing": {"seconds": 2.0}}


def validation(number: int) -> log_file.Record:
    return {"kind": "validation", "step": number, "tokens": number * 8, "mean": 2.0, "losses": {"b": 1.0, "a": 3.0}}


def event(number: int) -> log_file.Record:
    return {"kind": "event", "step": number, "what": "spike", "message": "the loss jumped", "limit": 3}


def test_reopening_drops_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.write(step(1))
    offset = first.sync()["bytes"]
    first.write(step(2))
    first.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')  # killed in the middle of a line
    again = opened(tmp_path, offset=offset, step=1)
    again.write(step(2))
    again.close()
    assert [record["step"] for record in log_file.read(tmp_path / "log.jsonl", "step")] == [1, 2]


def test_a_log_shorter_than_the_checkpoint_remembers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has 0 bytes, but was 100 long"):
        opened(tmp_path, offset=100, step=2)


def test_records_are_read_by_kind(tmp_path: Path) -> None:
    written = opened(tmp_path)
    for record in (validation(0), step(1), event(1), step(2)):
        written.write(record)
    written.close()
    path = tmp_path / "log.jsonl"
    assert log_file.read(path, "event") == [event(1)]
    assert log_file.read(path, "step") == [step(1), step(2)]
    assert log_file.read(path, "validation") == [validation(0)]


def test_every_line_is_json_that_strict_readers_take(tmp_path: Path) -> None:
    written = opened(tmp_path)
    written.write({**step(1, float("nan")), "domains": {"a": {"loss": float("inf")}}, "list": [float("-inf"), 1]})
    written.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert (record["loss"], record["domains"], record["list"]) == (None, {"a": {"loss": None}}, [None, 1])


def test_the_curves_of_a_record_are_its_finite_numbers_and_no_tables() -> None:
    experts = {"entropy": 0.5, "layers": {"peak": [0.25, 0.5]}, "tokens": [[1, 2], [3, 4]]}
    record = {**step(3), "experts": experts, "rates": {"router": 0.5}, "sampler": {"cursor": [1]}, "grad_norm": None}
    assert dict(log_file.numbers({**record, "lr": float("nan")})) == {
        "step/loss": 1.5,
        "step/parts/balance": 0.25,
        "step/total": 1.75,
        "step/experts/entropy": 0.5,
        "step/experts/layers/peak/0": 0.25,
        "step/experts/layers/peak/1": 0.5,
        "step/rates/router": 0.5,
        "step/timing/seconds": 2.0,
    }


def test_the_csv_of_a_long_run_stays_small_enough_for_git() -> None:
    for steps in (1, 1999, 2000, 2001, 13_623):
        lines = log_file.loss_csv([step(i) for i in range(1, steps + 1)]).splitlines()[1:]
        assert min(steps, 1000) <= len(lines) <= 2000
        assert lines[-1].startswith(f"{steps},")
        numbers = [int(line.split(",")[0]) for line in lines]
        assert len({b - a for a, b in itertools.pairwise(numbers)}) <= 1


def test_csv_columns_are_step_tokens_loss_and_then_what_there_is() -> None:
    assert log_file.loss_csv([{**step(3), "parts": {}}]).splitlines()[0] == "step,tokens,loss,total,grad_norm,lr"
    more = {**step(4), "parts": {"balance": 0.25, "kl": 0.5}, "rates": {"router": 0.002}, "grad_norm": None}
    assert log_file.loss_csv([step(3), more]) == (
        "step,tokens,loss,balance,kl,total,grad_norm,lr,lr_router\n"
        "3,24,1.5,0.25,,1.75,0.5,0.001,\n"
        "4,32,1.5,0.25,0.5,1.75,,0.001,0.002\n"
    )
    assert log_file.validation_csv([validation(0)]) == "step,tokens,mean,b,a\n0,0,2.0,1.0,3.0\n"


COURSE = [validation(0), step(1), step(2), validation(2), event(2), step(3), step(4), validation(4), step(5), step(6)]
AFTER = {0: 0, 2: 4, 4: 8}  # step of a checkpoint -> records before it


@given(
    kills=st.lists(st.integers(0, len(COURSE)), max_size=4),
    torn=st.booleans(),
    kind=st.sampled_from([Remembering, Rewinding]),
)
@settings(max_examples=80, deadline=None)
def test_however_often_a_run_is_killed_a_tracker_has_every_point_once(
    kills: list[int], torn: bool, kind: type[Remembering], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log")
    points: list[tuple[int, dict[str, float]]] = []
    at, offset = 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_file, "start", lambda names, run, *, step: [kind(points, step)])
        for stop in [*kills, len(COURSE)]:
            current = opened(folder, offset=offset, step=at)
            for count in range(AFTER[at], stop):
                current.write(COURSE[count])
                if count + 1 in AFTER.values():
                    at, offset = COURSE[count]["step"], current.sync()["bytes"]
            if torn:
                with (folder / "log.jsonl").open("a") as file:
                    file.write('{"kind": "step", "step": 7')
        current.close()
    assert points == [
        (record["step"], dict(log_file.numbers(record))) for record in COURSE if record["kind"] != "event"
    ]


@pytest.mark.parametrize("kind", [Remembering, Rewinding])
def test_after_a_rollback_the_log_has_the_new_course_alone_and_a_tracker_at_least_that(
    kind: type[Remembering], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(log_file, "start", lambda names, run, *, step: [kind(points, step)])
    current = opened(tmp_path)
    for record in (validation(0), step(1), step(2)):
        current.write(record)
    offset = current.sync()["bytes"]
    current.write(step(3, loss=99.0))
    current.rewind(offset=offset, step=2)
    current.write(step(3, loss=1.0))
    written = (tmp_path / "log.jsonl").read_bytes()
    assert current.sync() == {"bytes": len(written), "xxh3_128": xxhash.xxh3_128_hexdigest(written)}
    current.close()
    assert [record["loss"] for record in log_file.read(tmp_path / "log.jsonl", "step")] == [1.5, 1.5, 1.0]
    course = [curves["step/loss"] for at, curves in points if at == 3]
    assert course == ([1.0] if kind.rewinds else [99.0, 1.0])
    again = opened(tmp_path, offset=offset, step=2)  # killed after the rollback, which is not forgotten
    again.write(step(3, loss=1.0))
    again.write(step(4))
    again.close()
    assert [at for at, _ in points] == ([0, 1, 2, 3, 4] if kind.rewinds else [0, 1, 2, 3, 3, 4])


def test_a_tracker_that_fails_is_left_out_with_a_word_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Remembering):
        def write(self, step: int, numbers: Mapping[str, float]) -> None:
            raise ConnectionError("the server has gone")

    points: list[tuple[int, dict[str, float]]] = []
    said: list[Any] = []
    monkeypatch.setattr(log_file, "start", lambda names, run, *, step: [Gone([], 0), Remembering(points, 0)])
    current = log_file.LogFile(a_run(tmp_path), names=[], offset=0, step=0, say=said.append)
    current.write(step(1))
    current.write(step(2))
    current.close()
    assert [at for at, _ in points] == [1, 2]
    assert len(log_file.read(tmp_path / "log.jsonl", "step")) == 2
    assert len(said) == 1
    assert "Gone failed (ConnectionError: the server has gone); training goes on without it" in said[0]


@pytest.mark.parametrize("kind", [Remembering, Rewinding])
def test_a_tracker_that_is_new_to_a_run_is_told_it_from_its_start(
    kind: type[Remembering], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: dict[str, list[tuple[int, dict[str, float]]]] = {"a": [], "b": []}
    monkeypatch.setattr(log_file, "start", lambda names, run, *, step: [kind(points[name], step) for name in names])
    first = log_file.LogFile(a_run(tmp_path), names=["a"], offset=0, step=0)
    for number in (1, 2):
        first.write(step(number))
    offset = first.sync()["bytes"]
    first.write(step(3))
    first.close()
    for names in (["a", "b"], ["b", "a"]):  # killed, and started again
        again = log_file.LogFile(a_run(tmp_path), names=names, offset=offset, step=2)
        again.write(step(3))
        again.close()
    assert [[at for at, _ in told] for told in points.values()] == [[1, 2, 3], [1, 2, 3]]
    (tmp_path / "sent.json").write_text("{")  # then all are new: told twice is better than not at all
    log_file.LogFile(a_run(tmp_path), names=["a"], offset=offset, step=2).close()
    assert {at for at, _ in points["a"]} >= {1, 2}

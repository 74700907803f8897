from __future__ import annotations

import json
import os
import random
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from tasks import scratch
from tasks.pretrain.checkpoints import random_state, store
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.engine import checkpoint_writer
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.job import TrainingError
from tests.pretrain.engines import build, settings, train

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def built() -> Engine:
    return build(settings())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


OPERATIONS = [(Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")]


def make(folder: Path, **fields: Any) -> CheckpointManager:
    return CheckpointManager(folder, params=settings(**fields), rank=0, world_size=1)


def entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def log_of(folder: Path) -> dict[str, Any]:
    """The run's log beside checkpoints/, two bytes long so far."""
    log = folder.parent / "training/log.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.write_bytes(b"{}")
    return entry(b"{}")


def written(folder: Path, step: int) -> Path:
    """A checkpoint of one small file, as `_commit` leaves it."""
    path = folder / store.tag(step)
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(step))
    files = {"weights": entry(bytes(step))}
    scratch.write_sealed(path / "state.json", {"step": step, "files": files, "log": log_of(folder)})
    scratch.write_json(folder / "latest.json", {"tag": path.name})
    return path


def staged(checkpoints: CheckpointManager, step: int) -> Path:
    """Everything of a checkpoint but its commit."""
    staging = checkpoints.folder / f".tmp-{store.tag(step)}"
    staging.mkdir(parents=True)
    (staging / "weights").write_bytes(bytes(step))
    scratch.write_json(staging / "written-0.json", {"weights": entry(bytes(step))})
    return staging


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("pointer", ["missing", "", "{", '{"tag": "step-00000002"}', "[]", "\0\0"])
def test_the_newest_whole_checkpoint_is_found_whatever_the_pointer_says_and_a_crashed_save_is_swept_away(
    folder: Path, pointer: str
) -> None:
    checkpoints = make(folder)
    assert checkpoints.latest() is None
    for step in (2, 4, 6):
        written(folder, step)
    (folder / "latest.json").unlink()
    if pointer != "missing":
        (folder / "latest.json").write_text(pointer)
    (folder / ".tmp-step-00000008").mkdir()
    result = checkpoints.latest()
    assert result is not None
    assert (result["step"], result["tag"]) == (6, "step-00000006")
    assert store.steps(folder) == [2, 4, 6]
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("keep_every", [None, 4])
def test_the_newest_and_the_milestones_are_kept(tmp_path: Path, keep_every: int | None) -> None:
    checkpoints = make(tmp_path, keep=2, keep_every=keep_every)
    for step in range(2, 13, 2):
        checkpoints._commit(staged(checkpoints, step), {"step": step, "log": {}})
    assert store.steps(tmp_path) == [*([4, 8] if keep_every else []), 10, 12]


def test_a_save_stopped_before_any_of_its_operations_leaves_a_whole_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        """As kill -9: no handler sees it."""

    left = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped
            return function(*args, **kwargs)

        return call

    seen = set()
    for operations in range(100):
        folder = tmp_path / str(operations) / "checkpoints"
        checkpoints = make(folder, keep=1)
        for step in (2, 4):
            written(folder, step)
        staging = staged(checkpoints, 6)
        with monkeypatch.context() as patch:
            left = operations
            for holder, name in OPERATIONS:
                patch.setattr(holder, name, counted(getattr(holder, name)))
            try:
                checkpoints._commit(staging, {"step": 6, "log": log_of(folder)})
                through = True
            except Stopped:
                through = False
        result = make(folder).latest()
        assert result is not None
        assert store.damage(folder / result["tag"]) is None
        assert result["step"] in {4, 6}
        assert not list(folder.glob(".tmp-*"))
        seen.add(result["step"])
        if through:
            break
    assert through
    assert operations > 10
    assert seen == {4, 6}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path / "weights").write_bytes(b"1"), "weights has 1 bytes of 4"),
        (lambda path: (path / "weights").write_bytes(b"\0\0\1\0"), "weights: its content has changed"),
        (lambda path: (path / "weights").unlink(), "weights is missing"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / "state.json").write_text(""), "state.json cannot be read"),
        (lambda path: (path / "state.json").write_bytes(b"\xff" * 9), "state.json cannot be read"),
        (lambda path: scratch.write_json(path / "state.json", {"step": 4, "files": {}}), "older code wrote it"),
        (lambda path: shutil.copy(path.parent / "step-00000002/state.json", path), "state.json is of step 2"),
        (lambda path: (path / "old_optim_states.pt").touch(), "old_optim_states.pt is not of this checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_word(
    folder: Path, damage: Callable[[Path], object], told: str
) -> None:
    written(folder, 2)
    path = written(folder, 4)
    damage(path)
    checkpoints = make(folder)
    result = checkpoints.latest()
    assert result is not None
    assert result["step"] == 2
    (note,) = checkpoints.notes
    assert str(path) in note
    assert told in note
    assert "going on from the checkpoint of step 2" in note
    assert store.steps(folder) == [2]


def test_any_flipped_bit_of_a_state_is_found_or_changes_nothing(folder: Path) -> None:
    path = written(folder, 4)
    whole = store.state(path)
    text = (path / "state.json").read_bytes()
    result = 0
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "state.json").write_bytes(flipped)
        if store.damage(path, content=False):
            result += 1
        else:
            assert store.state(path) == whole  # a space for a tab
    assert result > 0.9 * len(text) * 8


def test_a_checkpoint_whose_log_was_changed_is_passed_over_for_one_from_before_the_change(folder: Path) -> None:
    log = folder.parent / "training/log.jsonl"
    for step, length in ((2, 2), (4, 12)):
        path = written(folder, step)
        content = b"{}" + bytes(length - 2)
        log.write_bytes(content + b"later")
        state = {"step": step, "files": {}, "log": entry(content)}
        scratch.write_sealed(path / "state.json", state)
    make(folder).latest()
    log.write_bytes(b"{}" + b"1" * 15)
    checkpoints = make(folder)
    result = checkpoints.latest()
    assert result is not None
    assert result["step"] == 2
    assert "log.jsonl is not the log that it goes on from: its first 12 bytes" in checkpoints.notes[0]


def test_one_that_may_not_be_read_is_not_taken_for_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(folder, 2)

    def refused(_path: Path) -> Any:
        raise PermissionError(13, "Permission denied", "state.json")

    monkeypatch.setattr(scratch, "read_sealed", refused)
    with pytest.raises(PermissionError):
        make(folder).latest()
    assert store.steps(folder) == [2]


def test_with_all_checkpoints_damaged_nothing_is_deleted_and_the_error_names_them(folder: Path) -> None:
    for step in (2, 4):
        (written(folder, step) / "weights").unlink()
    with pytest.raises(TrainingError, match=r"step-00000004 is damaged: weights is missing.*step-00000002.*--discard"):
        make(folder).latest()
    assert names(folder) == ["latest.json", "step-00000002", "step-00000004"]


def test_a_flipped_byte_in_any_of_deepspeeds_files_is_found_with_its_record(tmp_path: Path, built: Engine) -> None:
    train(built, range(1))
    checkpoints = make(tmp_path)
    checkpoints.save(built, state={"step": 1})
    checkpoints.finish()
    path = tmp_path / "step-00000001"
    assert store.damage(path) is None
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for at in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
            assert file.name in (store.damage(path) or ""), at
        file.write_bytes(content)
    for file in path.glob("*.pt"):  # 4 KiB of zeros in the middle of a tensor
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        at = largest.header_offset + 128
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        file.write_bytes(content[: file.stat().st_size])
        assert f"{file.name}: record {largest.filename}: " in (store.damage(path) or "")
        break
    assert store.damage(path, content=False) is None


def test_training_goes_on_while_files_are_written_and_the_checkpoint_is_of_its_step(
    tmp_path: Path, built: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(built, range(2))
    expected, release = built.full_weights(), threading.Event()
    assert expected is not None
    save = torch.save
    monkeypatch.setattr(
        checkpoint_writer.torch, "save", lambda *args, **kwargs: (release.wait(), save(*args, **kwargs))
    )
    checkpoints = make(tmp_path)
    checkpoints.save(built, state={"step": 2})
    later = train(built, range(2, 5))  # with the first file not begun
    assert store.find(tmp_path) is None
    release.set()
    checkpoints.finish()
    assert checkpoints.blocked > 0

    other = build(settings())
    result = make(tmp_path).latest()
    assert result is not None
    make(tmp_path).restore(other, result)
    restored = other.full_weights()
    assert restored is not None
    assert all(torch.equal(tensor, restored[name]) for name, tensor in expected.items())
    assert train(other, range(2, 5)) == later
    checkpoints.restore(built, result)  # and back in the engine that went on
    assert train(built, range(2, 5)) == later


def test_the_optimizer_step_waits_until_all_is_copied(
    tmp_path: Path, built: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    backward = threading.Event()
    fill = checkpoint_writer.Copies.fill

    def slow(copies: checkpoint_writer.Copies) -> None:
        assert backward.wait(60)
        fill(copies)
        events.append("copied")

    monkeypatch.setattr(checkpoint_writer.Copies, "fill", slow)
    handle = built.deepspeed.basic_optimizer.register_step_post_hook(lambda *_: events.append("stepped"))
    checkpoints = make(tmp_path)
    checkpoints.save(built, state={"step": 2})
    done = built.backward

    def after(loss: torch.Tensor) -> None:
        done(loss)
        backward.set()

    monkeypatch.setattr(built, "backward", after)
    train(built, range(1))
    checkpoints.finish()
    handle.remove()
    assert events[0] == "copied"
    assert set(events[1:]) == {"stepped"}


@pytest.mark.parametrize("surfaces", ["check", "save", "finish", "latest"])
def test_a_full_disk_is_told_at_the_next_call_and_leaves_nothing_half(
    tmp_path: Path, built: Engine, monkeypatch: pytest.MonkeyPatch, surfaces: str
) -> None:
    checkpoints = make(tmp_path)
    checkpoints.save(built, state={"step": 2})
    checkpoints.finish()
    before = names(tmp_path)

    def full(_content: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.torch, "save", full)
        checkpoints.save(built, state={"step": 4})
        assert checkpoints._write is not None
        assert checkpoints._write.done.wait(60)
    calls = {"save": lambda: checkpoints.save(built, state={"step": 6})}
    with pytest.raises(TrainingError, match=r"of step 4 could not be written.*GB free.*of step 2 is whole.*Make room"):
        calls.get(surfaces, getattr(checkpoints, surfaces))()
    assert names(tmp_path) == before
    checkpoints.save(built, state={"step": 8})  # there is room again
    checkpoints.finish()
    result = checkpoints.latest()
    assert result is not None
    assert result["step"] == 8


def test_a_file_of_deepspeeds_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"module": Trap()}, tmp_path / "file.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint_writer.load(tmp_path / "file.pt")
    assert not (tmp_path / "sprung").exists()


def test_copies_share_what_was_shared_and_leave_the_buffer_around_a_view() -> None:
    buffer = torch.arange(1000.0)
    view = buffer[10:14]
    copies = checkpoint_writer.Copies()
    made = copies.stand_in({"a": view, "b": [view, (view.view(2, 2),)], "c": 3, "empty": torch.empty(0, 2)})
    copies.fill()
    buffer.zero_()
    assert made["a"].tolist() == [10, 11, 12, 13]
    assert made["a"] is made["b"][0]
    assert made["b"][1][0].tolist() == [[10, 11], [12, 13]]
    assert made["a"].untyped_storage().nbytes() == 16
    assert (made["c"], made["empty"].shape) == (3, (0, 2))


def draw() -> list[float]:
    return [random.random(), random.gauss(), *np.random.randn(3).tolist(), *torch.randn(3).tolist()]


def test_random_states_survive_json_bit_for_bit() -> None:
    random.gauss()  # leaves a second value cached
    np.random.randn()
    saved = json.loads(json.dumps(random_state.save()))
    expected = draw()
    random_state.restore(saved)
    assert draw() == expected


def test_fresh_random_states_depend_on_seed_step_and_rank_alone() -> None:
    drawn: dict[tuple[int, int, int], list[float]] = {}
    for key in [(0, 2, 0), (0, 2, 1), (0, 4, 0), (1, 2, 0), (0, 2, 0)]:
        random_state.reseed(key[0], step=key[1], rank=key[2])
        assert drawn.setdefault(key, values := draw()) == values
    assert len({tuple(values) for values in drawn.values()}) == 4

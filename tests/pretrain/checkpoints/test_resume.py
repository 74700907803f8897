"""kill -9, full disks and other accidents: what the next run makes of them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from tests.pretrain.projects import assert_same_run, checkpoints, configure, timeless, wait_for, workers
from tests.pretrain.warm_stages import kill_when, stage, start

pytestmark = pytest.mark.e2e


def records(project: Path) -> int:
    log = next(project.glob(".scratch/pretrain-tiny/*/training/log.jsonl"), None)
    return len(log.read_bytes().splitlines()) if log else 0


def flip(file: Path, share: float) -> None:
    """Flip a bit of a file, so far into it."""
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)


def fill_disk() -> None:
    """Let the log fit, and the optimizer's state not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_run_killed_in_a_step_and_in_a_save_and_out_of_disk_ends_as_if_nothing_had_happened(
    project: Path, finished: Path
) -> None:
    run = start("tasks.pretrain", "tiny", cwd=project)
    wait_for(lambda: records(project) >= 1)
    second = stage("tasks.pretrain", "tiny", cwd=project)
    assert second.returncode == 1
    assert "already being run by process" in second.stderr
    wait_for(lambda: records(project) >= 4)
    os.kill(workers(project)[0], signal.SIGKILL)
    killed = run.wait()
    assert killed.returncode == 1
    assert "killed by signal 9" in killed.stderr
    assert "Run again" in killed.stderr

    unfinished = ".scratch/*/*/checkpoints/.tmp-step-*"
    for left in project.glob(unfinished):  # the killed worker may have been in a save too
        shutil.rmtree(left)
    kill_when(lambda: checkpoints(project)[1:] and any(project.glob(unfinished)), cwd=project)
    before = checkpoints(project)
    assert len(before) >= 2

    full = stage("tasks.pretrain", "tiny", cwd=project, limit=fill_disk)
    assert full.returncode == 1
    assert "could not be written" in full.stderr
    assert "is whole" in full.stderr
    assert "Traceback" not in full.stderr
    assert set(before) <= set(checkpoints(project))

    mixture = project / "runs/tiny/mixture.json"
    weights = mixture.read_text()
    content = json.loads(weights)
    first, second = content["weights"]
    content["weights"] |= {first: content["weights"][first] - 0.01, second: content["weights"][second] + 0.01}
    mixture.write_text(json.dumps(content))
    run = start("tasks.pretrain", "tiny", cwd=project)
    wait_for(lambda: (said := run.stdout) and "\n" in said)
    run.process.kill()
    said = run.wait().stdout
    wait_for(lambda: not workers(project))
    assert "the mixture changed since step" in said
    assert "which is kept in" in said
    mixture.write_text(weights)

    newest = checkpoints(project)[-1]
    broken = newest / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    flip(broken, 0.5)
    (newest.parent / "latest.json").unlink()
    last = stage("tasks.pretrain", "tiny", cwd=project)
    assert last.returncode == 0, last.stderr
    assert f"{newest.relative_to(project)} is damaged: {broken.name}: record " in last.stdout
    assert f"going on from the checkpoint of step {int(before[-2].name[5:])}\n" in last.stdout
    assert_same_run(project, finished)
    metrics = json.loads((project / "runs/tiny/pretrain.json").read_text())
    assert metrics["resumed_from"]["step"] > 0
    assert metrics["final_weights"] == json.loads((finished / "runs/tiny/pretrain.json").read_text())["final_weights"]


def test_a_run_goes_on_with_one_process_and_then_with_two_again_on_the_same_batches(
    project: Path, finished: Path
) -> None:
    for processes, step in ((2, 4), (1, 8)):
        configure(project, processes=processes)
        kill_when(lambda step=step: f"step-{step:08}" in [path.name for path in checkpoints(project)], cwd=project)
        *_, older, newest = checkpoints(project)
        shutil.copy(older / "mp_rank_00_model_states.pt", newest)
        (newest.parent / "latest.json").write_text("{")
    configure(project, processes=2)
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "pretrain.processes: 1 -> 2" in done.stdout
    assert f"{newest.relative_to(project)} is damaged: mp_rank_00_model_states.pt" in done.stdout
    log = timeless(project / "runs/tiny/training/log.jsonl")
    two = [record for record in log if record["kind"] != "event"]
    assert [record["message"] for record in log if record["kind"] == "event"] == [
        f"from here on pretrain.processes: {change}" for change in ("2 -> 1", "1 -> 2")
    ]
    one = timeless(finished / "runs/tiny/training/log.jsonl")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        windows = [{d: result["windows"] for d, result in each.get("domains", {}).items()} for each in (a, b)]
        assert windows[0] == windows[1]
        value = "loss" if a["kind"] == "step" else "mean"
        assert a[value] == pytest.approx(b[value], rel=1e-4)

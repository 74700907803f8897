"""How the workers are started, what ends them, and what the user reads when one fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.pretrain.job import Diverged, Job, TrainingError
from tasks.pretrain.launch import launcher
from tasks.settings import Pretrain
from tests.pretrain.conftest import ROOT
from tests.pretrain.launch import fake_srun
from tests.pretrain.projects import checkpoints, configure, processes, wait_for, workers
from tests.pretrain.warm_stages import kill_when, stage

HOST = socket.gethostname()
SLURM = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"}

WORKER = '''
def run(job):
    """Do what the file `order` says: meet the others and be killed as rank 1, fail as rank 1, or sleep."""
    import signal, time
    order, rank = (job.workspace / "order").read_text(), int(os.environ["RANK"])
    if order == "die":
        import torch
        torch.distributed.init_process_group("gloo")
        total = torch.tensor([float(rank + 1)])
        torch.distributed.all_reduce(total)
        (job.workspace / f"met-{rank}").write_text(str(total.item()))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()
    if rank == 1 and order == "fail":
        raise TrainingError("domain `web` has no windows left")
    (job.workspace / f"sleeps-{rank}").touch()
    time.sleep(600)


if __name__'''


def params(**fields: Any) -> Pretrain:
    return Pretrain(
        **{"tokens": 64, "seq_len": 8, "batch": 4, "micro_batch": 2, "learning_rate": 1e-3, "processes": 2} | fields
    )


def put_srun(folder: Path) -> Path:
    """Make a folder with an `srun` in it, to be put into PATH."""
    srun = folder / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(f"#!{sys.executable}\n{Path(fake_srun.__file__).read_text()}")
    srun.chmod(0o755)
    return srun.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose workers meet and then do as they are told, with srun in PATH; the test runs inside it."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "tasks", project / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    worker = project / "tasks/pretrain/launch/worker.py"
    worker.write_text(worker.read_text().replace("\nif __name__", WORKER))
    (project / "work").mkdir()
    monkeypatch.setenv("PATH", f"{put_srun(tmp_path)}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.chdir(project)
    (project / "hosts").write_text("# this machine\nlocalhost slots=2\n")
    return project


def job(order: str, **fields: Any) -> Job:
    Path("work/order").write_text(order)
    nowhere = {name: Path(name) for name in ("corpus", "model", "parent", "mixture")}
    return Job(pipeline="tiny", params=params(**fields), workspace=Path("work"), **nowhere)


STARTED = {"local": {}, "hostfile": {"launcher": "hostfile", "hostfile": "hosts"}, "slurm": {"launcher": "slurm"}}


@pytest.mark.parametrize("kind", STARTED)
def test_the_ranks_meet_whoever_starts_them_and_one_that_is_killed_is_told_with_its_host(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "slurm":
        for name, value in SLURM.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=rf"rank 1 on {HOST}: .*killed by signal 9.*pretrain\.micro_batch"):
        launcher.run(job("die", **STARTED[kind]))
    assert [Path(f"work/met-{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]
    assert workers(folder) == []


def test_an_error_of_a_rank_that_is_not_the_first_reaches_the_user_and_no_old_one_does(folder: Path) -> None:
    old = {"kind": "error", "message": "old", "rank": 0, "host": HOST, "time": 0.0}
    Path("work/failure-0.json").write_text(json.dumps(old))
    with pytest.raises(TrainingError, match=rf"^domain `web` has no windows left \(rank 1 on {HOST}\)$"):
        launcher.run(job("fail"))


def test_a_launcher_that_ends_well_before_training_did_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    monkeypatch.setattr(launcher, "command", lambda *_, **__: ["true"])
    with pytest.raises(TrainingError, match="ended before training did"):
        launcher.run(job("nothing"))
    Path("work/pretrain.json").touch()
    launcher.run(job("nothing"))
    with ThreadPoolExecutor(1) as thread:  # which may set no handler of signals
        thread.submit(launcher.run, job("nothing")).result()


def test_a_loss_that_is_not_finite_arrives_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    told = {"kind": "error", "message": "the loss", "rank": 0, "host": HOST, "time": 0.0, "diverged": True}
    line = ["sh", "-c", f"echo '{json.dumps(told)}' > work/failure-0.json; exit 1"]
    monkeypatch.setattr(launcher, "command", lambda *_, **__: line)
    with pytest.raises(Diverged, match=r"^the loss "):
        launcher.run(job("nothing"))


STAGE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tasks.pretrain.launch import launcher
from tasks.pretrain.job import Job
launcher.run(Job.read(Path("work/job.json")))
"""


@pytest.mark.parametrize(
    ("kind", "number"), [("local", signal.SIGTERM), ("hostfile", signal.SIGKILL), ("slurm", signal.SIGKILL)]
)
def test_no_process_outlives_a_stage_that_is_stopped_or_killed(
    folder: Path, kind: str, number: signal.Signals
) -> None:
    job("sleep", **STARTED[kind]).write()
    with subprocess.Popen([sys.executable, "-c", STAGE], env=os.environ | SLURM) as stage:
        wait_for(lambda: Path("work/sleeps-0").exists() and Path("work/sleeps-1").exists())
        assert len(workers(folder)) >= 2
        stage.send_signal(number)
    assert stage.returncode == (128 + number if number == signal.SIGTERM else -number)
    wait_for(lambda: not any(processes(folder)), seconds=20)


@pytest.mark.e2e
def test_a_run_that_was_killed_goes_on_under_slurm(project: Path, tmp_path: Path) -> None:
    configure(project, processes=2, tokens=4 * 256)
    kill_when(lambda: checkpoints(project), cwd=project)
    configure(project, launcher="slurm")
    environ = SLURM | {"PATH": f"{put_srun(tmp_path)}{os.pathsep}{os.environ['PATH']}"}
    done = stage("tasks.pretrain", "tiny", cwd=project, env=environ)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((project / "runs/tiny/pretrain.json").read_text())
    assert (metrics["processes"], metrics["steps"]) == (2, 4)
    assert metrics["resumed_from"]["step"] > 0


def test_one_process_needs_no_launcher() -> None:
    line = launcher.command("job.json", params(processes=1), environ={})
    assert line == [sys.executable, "-m", "tasks.pretrain.launch.worker", "job.json", "--lifeline"]


def test_a_hostfile_must_have_as_many_slots_as_processes(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=2\n\n#three slots=4\ntwo slots=1\n")
    fields = {"launcher": "hostfile", "hostfile": str(hosts), "processes": 4, "micro_batch": 1}
    with pytest.raises(TrainingError, match=r"processes = 4, and .*hosts has 3 slots \(one: 2, two: 1\)"):
        launcher.command("job.json", params(**fields), environ={})


@pytest.mark.parametrize(
    ("text", "message"),
    [("one 2\n", r"line 1 \('one 2'\)"), ("one slots=1\none slots=1\n", "line 2"), (None, "is not there")],
)
def test_a_hostfile_that_cannot_be_read_says_where(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(TrainingError, match=message):
        launcher.slots(tmp_path / "hosts")


def test_other_machines_are_reached_by_pdsh_even_if_there_is_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("far-away slots=2\n")
    fields = {"launcher": "hostfile", "hostfile": str(tmp_path / "hosts")}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainingError, match=r"far-away by pdsh.*not installed"):
        launcher.command("job.json", params(**fields), environ={})
    (tmp_path / "pdsh").touch(mode=0o755)
    line = launcher.command("job.json", params(**fields), environ={})
    assert "--force_multi" in line
    assert "--no_ssh_check" not in line


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "SLURM_JOB_ID is not set"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "3"}, r"processes = 2, and the Slurm job has 3 tasks"),
        ({"SLURM_JOB_ID": "1", "PATH": "/nonexistent"}, "not in PATH"),
    ],
)
def test_slurm_without_a_fitting_job_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        launcher.command("job.json", params(launcher="slurm"), environ=environ)


def test_srun_gets_the_cores_that_the_job_has_for_a_task(folder: Path) -> None:
    path = {"PATH": os.environ["PATH"]}
    line = launcher.command("j", params(launcher="slurm"), environ=SLURM | path | {"SLURM_CPUS_PER_TASK": "6"})
    assert line[0] == "srun"
    assert {"--ntasks=2", "--cpus-per-task=6", "--input=all"} <= set(line)


def failure(rank: int, *, kind: str = "error", message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"rank": rank, "host": f"host{rank}", "kind": kind, "message": message, "time": float(rank)} | fields


EIGHT = params(processes=8, batch=8, micro_batch=1)


def test_the_reason_is_the_first_failure_of_the_kind_that_says_most() -> None:
    lost = failure(0, kind="unexpected", message="RuntimeError: Connection closed by peer")
    killed = failure(3, kind="killed", message="killed by signal 11 (SIGSEGV)", signal=11)
    told = failure(5, message="the disk is full")
    assert launcher.reason(1, [lost, killed, told], params=EIGHT) == "the disk is full (rank 5 on host5)"
    assert "rank 3 on host3: it was killed by signal 11 (SIGSEGV). Run again" in launcher.reason(
        1, [lost, killed], params=EIGHT
    )
    assert "rank 0 on host0 failed: RuntimeError: Connection" in launcher.reason(1, [lost], params=EIGHT)
    earlier = failure(7, message="first", time=0.5)
    assert launcher.reason(1, [told, earlier], params=EIGHT) == "first (rank 7 on host7)"


def test_what_every_rank_says_is_nobodys_in_particular() -> None:
    every = [failure(rank, message="the loss is not finite") for rank in range(4)]
    assert launcher.reason(1, every, params=params(processes=4, micro_batch=1)) == "the loss is not finite"
    assert launcher.reason(1, every[:1], params=params(processes=1)) == "the loss is not finite"


def test_a_launcher_that_dies_without_a_word_leaves_its_status() -> None:
    assert "killed by signal 9" in launcher.reason(-9, [], params=params(processes=1))
    assert "ended with status 3" in launcher.reason(3, [], params=params())
    assert "was killed by signal 6" in launcher.reason(-6, [], params=params())

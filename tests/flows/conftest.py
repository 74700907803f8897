"""A toy project: the stages of dvc.yaml with commands that take milliseconds, as a git and DVC repository."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import dvc.logger  # noqa: F401 (binds standard error before a CliRunner lends it a stream that it closes)
import pytest

from flows import dag
from tests.conftest import make_repository, obey_file_modes

ROOT = Path(__file__).parent.parent.parent

STEP = '''\
"""Write JSON to the outs given; with FAIL or SLEEP in the environment's file, fail or sleep."""

import json
import os
import sys
import threading
import time
from pathlib import Path

name, *outs = sys.argv[1:]
with Path("ran.txt").open("a") as file:
    file.write(name + "\\n")
if Path("sleep", name).exists():
    Path("pids", name).write_text(str(os.getpid()))
    print("sleeping", flush=True)
    time.sleep(600)
if Path("fail", name).exists():
    left = int(Path("fail", name).read_text())
    if left:
        Path("fail", name).write_text(str(left - 1))
        sys.exit(f"{name} went wrong")
value = json.loads(Path("values", name).read_text()) if Path("values", name).exists() else {"value": 1}
for out in outs:
    path = Path(out)
    own = Path("values", path.name)
    content = json.loads(own.read_text()) if own.exists() else value
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text(json.dumps(content))
    else:
        path.mkdir()
        (path / "part").write_text(json.dumps(content) + Path("source.txt").read_text())
    print("wrote", out, flush=True)
'''

JOBS = ("model", "sources", "corpus", "partition", "mixture", "pretrain", "control", "evaluate", "report")
SETTINGS = """\
models:
  toy: {source: "dir:nowhere", license: none}
corpora:
  toy:
    model: toy
    domains:
      prose: {source: "dir:nowhere", format: text, license: none}
pipelines:
  toy:
    model: toy
    corpus: toy
    mixture: {method: uniform}
    partition: {method: random, experts: 4, top_k: 2}
    pretrain: {tokens: 64, seq_len: 8, batch: 1, learning_rate: 1e-3}
    evaluate: {seq_len: 8}
"""


def stage(
    name: str, *, over: str, deps: list[str], outs: list[str], metrics: list[str], meta: str, params: str
) -> str:
    """One foreach stage as dvc.yaml has them; it imports jobs/NAME.py."""
    deps = ["step.py", f"data/code/{over}/${{key}}/jobs.{name}.json", *deps]
    lines = [
        f"  {name}:",
        f"    foreach: ${{{over}}}",
        "    do:",
        f"      cmd: python step.py {name} {' '.join(outs + metrics)}",
        "      deps:",
        *[f"        - {dep}" for dep in deps],
        "      params:",
        "        - pipelines.yaml:",
        f"            - {params}",
    ]
    if outs:
        lines += ["      outs:", *[f"        - {out}" for out in outs]]
    if metrics:
        lines += ["      metrics:", *[f"        - {m}:\n            cache: false" for m in metrics]]
    return "\n".join(lines + ([f"      meta: {meta}"] if meta else []))


def digest_stage(name: str, *, over: str, jobs: list[str]) -> str:
    """A stage that digests the code of others, as dvc.yaml has them."""
    folder = f"data/code/{over}/${{key}}"
    return f"""  {name}:
    foreach: ${{{over}}}
    do:
      cmd: python -m tasks.code {folder} {" ".join(f"jobs.{job}" for job in jobs)}
      deps:
        - jobs
      outs:
        - {folder}"""


def dag_file() -> str:
    """A dvc.yaml with the shape of the real one."""
    corpus, model, run = "data/corpora/${item.corpus}", "data/models/${item.model}", "runs/${key}"
    own = {"over": "pipelines", "params": "pipelines.${key}"}
    rows = [
        digest_stage("model-code", over="models", jobs=["model"]),
        digest_stage("corpus-code", over="corpora", jobs=["sources", "corpus"]),
        digest_stage("code", over="pipelines", jobs=list(JOBS[3:])),
        stage("model", over="models", params="models.${key}", deps=[], outs=["data/models/${key}"],
              metrics=["data/models/${key}.json"], meta="{retries: 1}"),
        stage("sources", over="corpora", params="corpora.${key}", deps=["source.txt"],
              outs=[], metrics=["data/corpora/${key}.sources.json"], meta="{retries: 1}"),
        stage("corpus", over="corpora", params="corpora.${key}",
              deps=["data/corpora/${key}.sources.json", "data/models/${item.model}"],
              outs=["data/corpora/${key}"], metrics=["data/corpora/${key}.json"], meta=""),
        stage("partition", **own, deps=[corpus, model], outs=[f"{run}/moe"], metrics=[], meta="{gpu: true}"),
        stage("mixture", **own, deps=[corpus, model, f"{run}/moe"], outs=[f"{run}/swarm"],
              metrics=[f"{run}/mixture.json"], meta="{gpu: true}"),
        stage("pretrain", **own, deps=[f"{run}/mixture.json", f"{run}/moe"], outs=[f"{run}/trained"],
              metrics=[f"{run}/pretrain.json"], meta="{gpu: true}"),
        stage("control", **own, deps=[f"{run}/mixture.json", f"{run}/trained"], outs=[f"{run}/control"],
              metrics=[f"{run}/control.json"], meta="{gpu: true}"),
        stage("evaluate", **own, deps=[f"{run}/trained", f"{run}/control", corpus], outs=[f"{run}/windows.json"],
              metrics=[f"{run}/evaluation.json"], meta="{gpu: true}"),
        stage("report", **own, deps=[f"{run}/evaluation.json"], outs=[f"{run}/report", f"{run}/model"], metrics=[],
              meta=""),
    ]  # fmt: skip
    return "vars:\n  - pipelines.yaml:models,corpora,pipelines\nstages:\n" + "\n".join(rows) + "\n"


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy projects to copy: `new`, with nothing run yet, and `done`, which `dvc repro` brought up to date."""
    new = tmp_path_factory.mktemp("new") / "toy"
    new.mkdir()
    (new / "step.py").write_text(STEP)
    (new / "source.txt").write_text("texts")
    (new / "jobs").mkdir()
    (new / "jobs" / "__init__.py").touch()
    for job in JOBS:
        (new / "jobs" / f"{job}.py").write_text(f'"""The code of {job}."""\n\nfrom jobs import shared\n')
    (new / "jobs" / "shared.py").write_text("VALUE = 1\n")
    (new / "dvc.yaml").write_text(dag_file())
    (new / "pipelines.yaml").write_text(SETTINGS)
    for folder in ("fail", "sleep", "values", "pids"):
        (new / folder).mkdir()
    judge(new, 1.5)
    (new / ".gitignore").write_text("/.scratch/\n/ran.txt\n/fail\n/sleep\n/values\n/pids\n/.prefect/\n")
    for name in ("tasks", "flows"):
        (new / name).symlink_to(ROOT / name)
    make_repository(new)
    done = tmp_path_factory.mktemp("done") / "toy"
    shutil.copytree(new, done, symlinks=True)
    repro(done)
    ran(done)
    return {"new": new, "done": done}


def repro(project: Path) -> None:
    """Bring a project up to date as `dvc repro` does, in this process."""
    from dvc.repo import Repo

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with contextlib.chdir(project), patch.dict(os.environ, PATH=path), Repo() as repo:
        repo.reproduce()


@pytest.fixture
def toy(templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a toy project in which nothing was run; also the current directory."""
    return enter(templates["new"], tmp_path / "toy", monkeypatch)


@pytest.fixture
def done_toy(templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a toy project that is up to date; also the current directory."""
    return enter(templates["done"], tmp_path / "toy", monkeypatch)


def enter(template: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a project and make it the current directory."""
    shutil.copytree(template, project, symlinks=True)
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    return project


@pytest.fixture
def dvc_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process do what the flow asks `dvc` commands for; test_stages.py and test_cli.py run real ones."""
    from flows import stages

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    lock, log = threading.Lock(), Path("ran.txt")

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    def execute(stage: dag.Stage, *, force: bool, log: Callable[[str], None]) -> bool:
        before = size()
        with lock, dag._repo() as repo:
            repo.reproduce(targets=[stage.name], single_item=True, force=force)
        return size() > before

    monkeypatch.setattr(stages, "execute", execute)


def ran(project: Path) -> list[str]:
    """Which stages' commands were really executed since the last call, in order."""
    log = project / "ran.txt"
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def evaluation(trained: float) -> dict[str, object]:
    """The content of an evaluation.json whose trained model has `trained` bits per byte in the mean."""

    def model(bits: float) -> dict[str, object]:
        each = {"prose": bits, "mean": bits}
        return {
            "bits_per_byte": each, "loss": each, "perplexity": each, "tasks": {},
            "parameters": {"total": 100, "active": 50}, "flops_per_token": 200,
        }  # fmt: skip

    return {
        "dense": model(1.0),
        "split": model(2.0),
        "trained": model(trained),
        "test": {"domains": {"prose": {"windows": 1, "tokens": 7, "bytes": 30}}, "seq_len": 8},
    }


def judge(project: Path, trained: float, *, error: float = 0.0, names: str = "abcd") -> None:
    """Let the toy project's evaluation stage find this the next time it runs.

    Args:
        trained: bits per byte, in the mean of the windows.
        error: by which every other window is above that mean, and the others below.
        names: of the windows, 100 bytes each.
    """
    signs = [(-1) ** i for i in range(len(names))]
    windows = {
        "windows": list(names),
        "bytes": [100] * len(names),
        "dense": [100 * math.log(2)] * len(names),
        "trained": [100 * math.log(2) * (trained + error * sign) for sign in signs],
    }
    (project / "values" / "evaluation.json").write_text(json.dumps(evaluation(trained)))
    (project / "values" / "windows.json").write_text(json.dumps({"prose": windows}))
    (project / "values" / "report").write_text(json.dumps([trained, error, names]))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Prefect server on a free port: the environment that reaches it. This process reaches it too."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    url = f"http://127.0.0.1:{port}/api"
    prefect = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    log = home / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **prefect}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: _healthy(url), seconds=120, otherwise=log.read_text)
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home}):
            yield prefect
            # What is still queued for the server must reach it now: after its end, Prefect would try for minutes.
            APILogWorker.drain_all(timeout=10)
            EventsWorker.drain_all(timeout=10)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(condition: Callable[[], object], *, seconds: float, otherwise: Callable[[], str] = str) -> None:
    """Wait for a condition; after `seconds`, fail with what `otherwise` tells."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"did not happen within {seconds} s\n{otherwise()}")
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """True if a process runs and is no zombie."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def moeforge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in the current directory, as a user who is not root."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        capture_output=True, text=True, env={**os.environ, **environment}, preexec_fn=obey_file_modes, timeout=300,
    )  # fmt: skip

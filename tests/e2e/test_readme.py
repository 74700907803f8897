"""The blocks of commands of README.md, as they stand there, each in a new shell; model and texts are tiny."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import artifacts, cli
from tests.conftest import ROOT, assert_kept_once, obey_file_modes

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
VENV = Path(sys.prefix)
PROGRAMS = ("make", "moeforge", "dvc", "prefect", "python")


def demo(settings: str) -> str:
    """The settings of the pipeline `tiny` as those of `demo`."""
    return re.sub(
        r"(?<=corpora:\n  )tiny|(?<=pipelines:\n  )tiny|(?<=corpus: )tiny|(?<=name: )tiny|tiny(?=})", "demo", settings
    )


def clone(project: Path) -> None:
    """Give the tiny project what a clone has beside the code, and the environment that `make` would install."""
    for name in ("Makefile", "README.md", "prefect.toml", "pyproject.toml", "requirements.lock", "recipes"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, project / name)
    settings = project / "pipelines.yaml"
    settings.write_text(demo(settings.read_text()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    toml = project / "prefect.toml"
    assert toml.read_text().count("4200") == 2
    toml.write_text(toml.read_text().replace("4200", str(port)))
    (project / ".venv").mkdir()
    for part in VENV.iterdir():
        (project / ".venv" / part.name).symlink_to(part)
    (project / ".venv/.installed").unlink(missing_ok=True)
    (project / ".venv/.installed").touch()


def shell(commands: str) -> str:
    """Run a block in a new shell of a user who is not root, up to the first command that fails; what it printed."""
    keep = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "LANG")
    home = Path.cwd() / "home"
    home.mkdir(exist_ok=True)
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment |= {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "PREFECT_WORKER_QUERY_SECONDS": "1"}
    log = home / "shell.log"  # a file, because what runs on in the background would keep a pipe open
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-ex", "-c", commands],
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            preexec_fn=obey_file_modes,
        )  # fmt: skip
    try:
        assert process.wait(1800) == 0, log.read_text()
    finally:  # a worker takes its time to end, and a second signal ends it at once
        for pid in left(process.pid):
            os.kill(pid, signal.SIGKILL)
    return log.read_text()


def left(session: int) -> list[int]:
    """The processes of a session that are still there."""
    import psutil

    pids = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError):  # it has ended since
            pids += [pid] * (os.getsid(pid) == session)
    return pids


@pytest.mark.e2e
@pytest.mark.skipif(not (VENV / "bin/activate").exists(), reason="the interpreter has no environment to activate")
def test_the_readmes_blocks_run_in_their_order_each_in_a_new_shell(
    tiny_repo: Path, request: pytest.FixtureRequest
) -> None:
    """Timings stand in metrics, so two runs cannot agree byte for byte: after the flow, `dvc repro` must find nothing
    to do and leave dvc.lock as it is. `.scratch` is on another disk."""
    clone(tiny_repo)
    if Path("/dev/shm").is_dir():
        elsewhere = tempfile.mkdtemp(dir="/dev/shm")
        request.addfinalizer(lambda: shutil.rmtree(elsewhere))
        (tiny_repo / ".scratch").symlink_to(elsewhere)
    first, use, ways = (re.sub("make (test|quick)", r"make --dry-run \1", block) for block in BLOCKS)

    said = shell(first)
    assert "bits/byte: mean" in said
    assert "source .venv/bin/activate" in said
    assert_kept_once(tiny_repo)
    lock = (tiny_repo / "dvc.lock").read_bytes()

    said = shell(use)
    assert "demo: everything is up to date" in said
    assert "runs/demo/moe: sound" in said
    assert (tiny_repo / "runs/demo/export").is_dir()

    said = shell(ways)
    assert "Data and pipelines are up to date" in said
    assert "Starting temporary server" not in said
    assert "Completed" in said
    assert "Accepted" in said
    assert (tiny_repo / "dvc.lock").read_bytes() == lock
    for path in ("runs/demo/mixture.json", "runs/demo/model"):
        assert artifacts.verify(Path(path)) == []
        assert CliRunner().invoke(cli.app, ["inspect", path]).exit_code == 0

    said = shell("\n".join(["source .venv/bin/activate", *re.findall(r"`(dvc (?:metrics|plots) \w+)`", README)]))
    assert "bits_per_byte" in said
    assert (tiny_repo / "dvc_plots/index.html").is_file()
    assert_kept_once(tiny_repo)


def test_every_command_of_the_readme_stands_in_a_block_that_is_run() -> None:
    others = re.sub(r"```sh\n.*?```", "", README, flags=re.DOTALL)
    fenced = "".join(re.findall(r"```.*?```", others, flags=re.DOTALL))
    assert len(BLOCKS) == 3
    assert not re.search(rf"^\s*(?:{'|'.join(PROGRAMS)}) ", fenced, flags=re.MULTILINE)


def test_the_prefect_commands_of_a_clone_send_no_telemetry_and_keep_their_state_in_it() -> None:
    code = (
        "from prefect.settings import Settings; s = Settings(); print(s.server.analytics_enabled, s.home, s.api.url)"
    )
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, env=clean
    )
    assert said.stdout.split() == ["False", ".prefect", "http://127.0.0.1:4200/api"]

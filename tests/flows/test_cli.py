"""The command line: help, errors, exit codes, and what each command prints. Real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import artifacts, cli, doctor, environment
from tasks.scratch import workspace
from tests.flows.conftest import ROOT, moeforge, ran

COMMANDS = {command.name or command.callback.__name__ for command in cli.app.registered_commands}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_of_each_command_has_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"moeforge {command}" in " ".join(result.output.split())


def test_the_help_imports_nothing_heavy() -> None:
    result = moeforge("--help")
    assert all(command in result.stdout for command in COMMANDS)
    code = "import sys, flows.cli; print(sorted({'torch', 'prefect', 'dvc', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


@pytest.fixture(autouse=True)
def _own_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process leaves the handler of SIGTERM alone."""
    monkeypatch.setattr(cli, "raise_on_sigterm", lambda: None)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if Prefect's server is asked for."""
    monkeypatch.setattr(environment, "connect", lambda: pytest.fail("a server was started"))


@pytest.mark.usefixtures("no_server")
def test_an_up_to_date_pipeline_says_so_without_starting_prefect(done_toy: Path) -> None:
    result = CliRunner().invoke(cli.app, ["run", "toy"])
    assert result.exit_code == 0, result.stderr
    assert "toy: everything is up to date (" in result.stdout
    assert "bits/byte: mean" in result.stdout
    assert str(done_toy / "runs/toy/report/index.html") in result.stdout.replace("\n", "")
    assert ran(done_toy) == []


@pytest.mark.usefixtures("no_server")
def test_a_corpus_that_is_up_to_date_or_cannot_be_shared_out_starts_no_server(done_toy: Path) -> None:
    for arguments, code, message in (
        (["toy", "--address", "tcp://node1:8786"], 1, "moeforge: address = 'tcp://node1:8786' is of a cluster"),
        (["elsewhere"], 1, "corpora has no 'elsewhere'; it has toy"),
        (["toy"], 0, "toy: done in"),
    ):
        result = CliRunner().invoke(cli.app, ["tokenise", *arguments])
        assert (result.exit_code, message in result.output) == (code, True), result.output
    assert ran(done_toy) == []


@pytest.mark.e2e
def test_a_run_shows_each_stage_and_ends_with_table_and_page(done_toy: Path, server: dict[str, str]) -> None:
    result = moeforge("run", "toy", "--force", "corpus", "--force", "report", **server)
    assert result.returncode == 0, result.stderr
    assert "corpus@toy | wrote data/corpora/toy" in result.stdout
    assert "report@toy | == done" in result.stdout
    assert "Flow run" not in result.stdout + result.stderr  # Prefect's own log stays on the server
    assert result.stdout.splitlines()[-1].startswith("toy: done in")


@pytest.mark.usefixtures("server")
def test_a_failing_stage_ends_in_one_message_without_a_traceback(done_toy: Path) -> None:
    (done_toy / "fail" / "corpus").write_text("9")
    result = CliRunner().invoke(cli.app, ["run", "toy", "--force", "corpus"])
    assert result.exit_code == 1
    assert "moeforge: corpus@toy: `python step.py corpus" in result.stderr
    assert "corpus went wrong" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "other"], "pipelines.yaml: pipelines has no 'other'; it has toy"),
        (["run", "toy", "--force", "train"], "no stage 'train' in this pipeline; it has model@toy"),
        (["plan", "recipes/none.yaml"], "recipes/none.yaml: not found"),
        (["inspect", "nowhere"], "nowhere: nothing is there"),
        (["inspect", "step.py"], "step.py: not known; give a shard"),
        (["verify", "step.py"], "step.py: not known; give a shard"),
    ],
)
def test_what_a_user_can_fix_is_one_message_and_exit_code_1(
    done_toy: Path, capfd: pytest.CaptureFixture[str], *, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert f"moeforge: {message}" in result.stderr
    assert "Traceback" not in result.output


def test_broken_settings_stop_every_command_before_it_starts(done_toy: Path) -> None:
    settings = done_toy / "pipelines.yaml"
    settings.write_text(settings.read_text().replace("learning_rate", "learning_rat"))
    for command in (["run", "toy"], ["plan", "toy"], ["status"]):
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 1
        assert "pipelines.toy.pretrain.learning_rat = 0.001: unknown key" in result.stderr


def test_a_pipeline_that_is_being_run_is_refused_and_shown_as_running(done_toy: Path) -> None:
    with workspace("run", "toy"):
        result = CliRunner().invoke(cli.app, ["run", "toy"])
        assert (result.exit_code, f"already being run by process {os.getpid()}" in result.stderr) == (1, True)
        assert "running" in CliRunner().invoke(cli.app, ["status"]).stdout


def test_status_tells_what_is_out_of_date(done_toy: Path) -> None:
    (done_toy / "source.txt").write_text("other")
    output = CliRunner().invoke(cli.app, ["status"]).stdout
    assert "out of date" in output
    assert "sources@toy" in output
    assert "1.5000" in output


def test_plan_tells_why_a_stage_would_run_and_what_follows(done_toy: Path) -> None:
    settings = done_toy / "pipelines.yaml"
    shape = "shape: {hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, " \
            "num_key_value_heads: 2, vocab_size: 32}"  # fmt: skip
    settings.write_text(settings.read_text().replace("license: none}\ncorpora", f"license: none, {shape}}}\ncorpora"))
    result = CliRunner().invoke(cli.app, ["plan", "toy", "--tflops", "1"])
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert "setting models.toy: modified" in rows["model@toy"]
    assert "cached" in rows["sources@toy"]
    assert "after model@toy" in rows["corpus@toy"]
    assert "training tokens" in result.stdout
    assert ran(done_toy) == []


class TestArtifacts:
    """inspect and verify, where they need no other room."""

    def checkpoint(self, folder: Path, *, value: float = 1.0) -> Path:
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 32,
        }))  # fmt: skip
        save_file(
            {"a": torch.full((4, 8), value), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "model.safetensors"
        )
        return folder

    def test_a_checkpoint_is_described_from_its_headers(self, tmp_path: Path) -> None:
        content = artifacts.inspect(self.checkpoint(tmp_path / "m"))
        assert content["stored_values"] == {"F32": 32, "BF16": 3}
        assert content["tensors"] == 2

    def test_a_sound_checkpoint_has_no_problems(self, tmp_path: Path) -> None:
        assert artifacts.verify(self.checkpoint(tmp_path / "m")) == []

    def test_a_value_that_is_not_finite_is_found(self, tmp_path: Path) -> None:
        (problem,) = artifacts.verify(self.checkpoint(tmp_path / "m", value=float("nan")))
        assert problem.endswith("model.safetensors: a holds a value that is not finite")

    def test_a_file_cut_short_is_found(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path / "m") / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
        (problem,) = artifacts.verify(path.parent)
        assert "cut short or damaged" in problem

    @pytest.mark.parametrize(
        ("weights", "problem"),
        [({"a": 0.5, "b": 0.5}, ""), ({"a": 0.5, "b": 0.4}, "sum to 0.9"), ({"a": -1, "b": 2}, "not negative")],
    )
    def test_weights_of_a_mixture_are_checked(
        self, tmp_path: Path, *, weights: dict[str, float], problem: str
    ) -> None:
        path = tmp_path / "mixture.json"
        path.write_text(json.dumps({"weights": weights}))
        problems = artifacts.verify(path)
        assert bool(problems) == bool(problem)
        assert problem in "".join(problems)

    def test_verify_exits_with_1_and_lists_the_problems(self, tmp_path: Path) -> None:
        self.checkpoint(tmp_path / "m", value=float("inf"))
        result = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "m")])
        assert result.exit_code == 1
        assert "not finite" in result.stdout
        assert "1 problem" in result.stderr


class TestDoctor:
    def test_this_environment_fits_its_own_pins(self) -> None:
        versions = {check.name: check for check in doctor._versions()}
        assert set(versions) == set(doctor.PACKAGES)
        assert all(check.ok for check in versions.values()), [c for c in versions.values() if not c.ok]

    def test_every_check_says_how_to_fix_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
        checks = {check.name: check for check in doctor.examine()}
        assert not checks["git"].ok
        assert not checks["C++ compiler"].ok
        assert not checks["Prefect server"].ok
        assert all(check.fix for check in checks.values() if not check.ok)

    def test_an_extra_that_is_not_whole_is_a_note_with_what_it_is_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_version", lambda package: None if package == "fastokens" else "1.0")
        checks = {check.name: check for check in doctor._extras()}
        fast, dask = checks["extra fast"], checks["extra dask"]
        assert (fast.ok, fast.needed, fast.value) == (False, False, "splintr-rs 1.0")
        assert fast.fix.startswith("pip install 'moeforge[fast]': without it, tokenising")
        assert (dask.ok, dask.value) == (True, "prefect-dask 1.0")

    def test_a_needed_thing_that_is_missing_gives_exit_code_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check(name="git", ok=False, value="none", fix="x")])
        assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 1
        monkeypatch.setattr(
            doctor, "examine", lambda: [doctor.Check(name="GPU", ok=False, value="none", fix="x", needed=False)]
        )
        assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0

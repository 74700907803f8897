"""The commands of README.md, run as a person would run them, on the pipeline `tiny` instead of `demo`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.flows.test_import import checkpoint

LINES = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [line for line in LINES if line.startswith(("moeforge ", "dvc "))]
# moeforge and dvc as the modules of the interpreter that runs the tests, whatever is on PATH
PROGRAMS = {"moeforge": "flows.cli", "dvc": "dvc"}


@pytest.mark.e2e
def test_the_readmes_commands_run_in_their_order(tiny_repo: Path) -> None:
    shutil.copytree(ROOT / "recipes", tiny_repo / "recipes")
    checkpoint(tiny_repo / "released/LLaMA-MoE-v1-3_5B-4_16")
    assert {command.split()[1] for command in COMMANDS} >= {"run", "plan", "status", "inspect", "verify", "doctor"}
    said = {}
    for command in [*COMMANDS, "dvc metrics show", "dvc metrics diff", "dvc plots show"]:
        program, *arguments = command.replace("demo", "tiny").split()
        done = subprocess.run(
            [sys.executable, "-m", PROGRAMS[program], *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[command] = done.stdout
    assert "bits/byte: mean" in said["moeforge run demo"]
    assert "everything is up to date" in said["moeforge run demo"]
    assert "sound" in said["moeforge verify runs/demo/moe"]
    assert "Data and pipelines are up to date" in said["dvc repro report@demo"]
    assert "bits_per_byte" in said["dvc metrics show"]
    assert (tiny_repo / "runs/tiny/model/README.md").is_file()
    assert (tiny_repo / "dvc_plots/index.html").is_file()
    assert "MixtralForCausalLM" in (tiny_repo / "llama-moe/config.json").read_text()

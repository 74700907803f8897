"""Deleting the folders of a plug-in deletes the feature: the rest of the project works without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

QUICK = ["tests/settings", "tests/recipes", "tests/test_plugin.py", "tests/bench/test_import_graph.py"]
QUICK += ["tests/flows/test_plan.py", "tests/pretrain/test_schedule.py", "tests/evaluate/report/test_charts.py"]


@pytest.mark.parametrize("name", ["analysis"])
def test_the_quick_tests_pass_in_a_tree_without_a_plugin(name: str, tmp_path: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for file in filter(None, files):
        if (ROOT / file).is_file() and not file.startswith((f"tasks/plugins/{name}/", f"tests/plugins/{name}/")):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, tmp_path / file)
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", *QUICK],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    shown = f"import tasks.plugin as p; print(p.FOLDER.is_relative_to({str(tmp_path)!r}), {name!r} in p.names())"
    assert subprocess.run(
        [sys.executable, "-c", shown],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    ).stdout.split() == ["True", "False"]

"""pytest collects every test file of the tree, and the wheel holds every file of the packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "tasks", "kernels/moe_kernels")


def tracked(*folders: str) -> list[str]:
    """Files of the folders that git tracks, or would: new ones count, deleted ones do not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({path for path in listed if (ROOT / path).is_file()})


def test_pytest_skips_no_folder_with_tests(pytestconfig: pytest.Config) -> None:
    """Its default `norecursedirs` has `build`, `dist` and others."""
    skipped = pytestconfig.getini("norecursedirs")
    tests = [path for path in tracked("tests", "flows", "tasks", "kernels", "bench") if is_test(path)]
    assert tests
    assert not [path for path in tests if any(fnmatch(part, s) for part in path.split("/")[:-1] for s in skipped)]
    assert {path.split("/")[0] for path in tests} == set(pytestconfig.getini("testpaths"))


def test_every_test_file_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    collected = {line.split(":")[0] for line in result.stdout.splitlines() if ".py:" in line}
    assert collected == {path for path in tracked("tests") if is_test(path)}


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    files = tracked(*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
    for path in files:
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / "tree" / path)
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "tree", capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {path.removeprefix("kernels/") for path in files if path.startswith(PACKAGES)}


def is_test(path: str) -> bool:
    return fnmatch(path.rsplit("/", 1)[-1], "test_*.py")

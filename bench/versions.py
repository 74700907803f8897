"""Runs a choice of tests with the lowest and with the newest versions that pyproject.toml allows.

    python -m bench.versions                                # both ends, half an hour on 2 cores, 3 to 7 GB each
    python -m bench.versions --ends newest --tests tests/kernels

uv resolves and installs (`pip install uv`). Each end gets an environment below .scratch/versions, which is made anew.
The lowest versions are those of the requirements themselves; what these bring is as new as they allow. The exit status
is 1 if a test fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from bench import common
from bench.common import ROOT

RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
TESTS = (
    "tests/kernels/test_cpu.py",  # torch
    "tests/kernels/test_interpreted.py",  # triton's interpreter
    "tests/kernels/test_compiled.py",  # triton's compiler
    "tests/kernels/test_register.py",  # transformers' experts interface
    "tests/kernels/test_autoep.py",  # DeepSpeed with transformers
    "tests/moe",  # transformers' model classes, safetensors, GGUF
    "tests/partition/test_identity.py",
    "tests/pretrain/engine",  # DeepSpeed
    "tests/corpus/dedup",  # rensa
    "tests/corpus/readers",  # pyarrow, fsspec, orjson
    "tests/evaluate/downstream/test_accuracy.py",  # lm-eval, datasets
    "tests/flows/test_stages.py",  # Prefect, DVC
    "tests/flows/test_deployment.py",  # Prefect's server, worker and schedules
)
"""What touches the packages that change most."""


def requirements(pyproject: Path) -> list[str]:
    """The names of the packages that the project itself asks for, on this Python."""
    stated = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    return [req.name for req in map(Requirement, stated) if not req.marker or req.marker.evaluate()]


def install(folder: Path, *, resolution: str) -> Path:
    """Make an environment with `.[dev]`; returns its Python.

    Raises:
        SystemExit: uv is missing, or it found no versions that fit together.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("bench.versions resolves by uv, which is missing; pip install uv")
    venv.create(folder, clear=True)
    python = folder / "bin" / "python"
    command = [uv, "pip", "install", "--python", str(python), "--resolution", resolution, "--editable", f"{ROOT}[dev]"]
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"uv left with {code}: {' '.join(command)}")
    return python


def installed(python: Path, names: Sequence[str]) -> dict[str, str]:
    """The version of each package in that environment; absent ones are left out."""
    code = "import sys\nfrom importlib.metadata import version\nfor name in sys.argv[1:]: print(name, version(name))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


def run(python: Path, tests: Sequence[str], *, report: Path) -> dict[str, Counter[str]]:
    """The outcomes (passed, failed, skipped) of each test file, from pytest's report."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    report.unlink(missing_ok=True)
    options = ["-o", "junit_family=xunit1", f"--junitxml={report}"]  # xunit1 names files
    subprocess.run([*command, *options, *tests], cwd=ROOT, env=environment)
    outcomes: dict[str, Counter[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes.setdefault(case.get("file") or "?", Counter())[outcome] += 1
    return outcomes


def table(versions: dict[str, dict[str, str]], outcomes: dict[str, dict[str, Counter[str]]]) -> Table:
    """A column an end; a row a package, then a row a test file."""
    shown = Table("", *versions)
    for name in {name: None for packages in versions.values() for name in packages}:
        shown.add_row(name, *(packages.get(name, "") for packages in versions.values()))
    shown.add_section()
    for file in {file: None for files in outcomes.values() for file in files}:
        shown.add_row(
            file, *(", ".join(f"{n} {what}" for what, n in files.get(file, {}).items()) for files in outcomes.values())
        )
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, run both ends, print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--ends", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders for pytest")
    parser.add_argument("--folder", type=Path, default=ROOT / ".scratch" / "versions")
    parser.add_argument("--keep", action="store_true", help="use the environments of the last call as they are")
    args = parser.parse_args(argv)
    names, versions, outcomes = requirements(ROOT / "pyproject.toml"), {}, {}
    for end in args.ends:
        folder = args.folder.resolve() / end
        keep = args.keep and (folder / "bin" / "python").exists()
        python = folder / "bin" / "python" if keep else install(folder, resolution=RESOLUTIONS[end])
        versions[end] = installed(python, names)
        outcomes[end] = run(python, args.tests, report=args.folder / f"{end}.xml")
    Console().print(table(versions, outcomes))
    sys.exit(any(counts["failed"] for files in outcomes.values() for counts in files.values()))


if __name__ == "__main__":
    main()

"""Checks that this machine is fit, a line each with how to fix what is missing. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows import environment

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.table import Table

PYTHON = (3, 11)
FREE_GB = 10
"""The demo leaves 6 GB, up to 10 while it trains: the model, five checkpoints, training checkpoints, archives."""
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "prefect", "dvc", "lm-eval", "datasets")
EXTRAS = {
    "fast": "without it, tokenising a corpus takes several times as long",
    "filters": "needed for filters of language, fluency and the rules of Gopher, C4 and FineWeb",
    "llama-cpp": "without it, speed in llama.cpp is not measured",
    "mixture": "needed for the domain weights of regmix and olmix",
    "dask": "needed for moeforge tokenise and weigh --runner dask",
}
HUB = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding; `needed` ones make the demo fail, the others only limit what can be done."""

    name: str
    ok: bool
    value: str
    fix: str = ""
    needed: bool = True


def examine() -> list[Check]:
    """Run all checks."""
    return [_python(), *_versions(), *_extras(), _compiler(), *_processor(), *_tools(), _disk(), _hub(), _server()]


def table(checks: list[Check]) -> Table:
    """The checks for the terminal."""
    from rich.table import Table

    result = Table(title="doctor", title_justify="left")
    for column in ("", "check", "found", "what to do"):
        result.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]missing[/]" if check.needed else "[yellow]note[/]"
        result.add_row(mark, check.name, check.value, "" if check.ok else check.fix)
    return result


def _python() -> Check:
    value = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, PYTHON))
    return Check(
        name="Python", ok=sys.version_info >= PYTHON, value=f"{value} ({sys.executable})",
        fix=f"make a virtual environment with Python {wanted} or newer: python{wanted} -m venv .venv",
    )  # fmt: skip


def _requirements() -> list[Requirement] | None:
    """What this project's own metadata states; None if it is not installed."""
    from packaging.requirements import Requirement

    try:
        return [Requirement(text) for text in importlib.metadata.requires("moeforge") or []]
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Check]:
    """Installed versions against what is required."""
    stated = _requirements()
    if stated is None:
        yield Check(name="moeforge", ok=False, value="not installed", fix="pip install -e '.[dev]'")
        return
    wanted = {req.name.lower(): req for req in stated if not req.marker or req.marker.evaluate()}
    for package in PACKAGES:
        requirement = wanted.get(package)
        limits = str(requirement.specifier) if requirement else ""
        value = _version(package)
        fits = value is not None and (requirement is None or requirement.specifier.contains(value, prereleases=True))
        yield Check(name=package, ok=fits, value=value or "not installed", fix=f"pip install '{package}{limits}'")


def _extras() -> Iterator[Check]:
    """Which of the packages of each extra are here; none is needed for the demo."""
    for extra, use in EXTRAS.items():
        names = [
            req.name
            for req in _requirements() or ()
            if req.marker and "extra" in str(req.marker) and req.marker.evaluate({"extra": extra})
        ]
        if not names:  # it has none for this Python
            continue
        here = {name: version for name in names if (version := _version(name))}
        value = ", ".join(f"{name} {version}" for name, version in here.items()) or "none"
        yield Check(
            name=f"extra {extra}", ok=len(here) == len(names), value=value, needed=False,
            fix=f"pip install 'moeforge[{extra}]': {use}",
        )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> Check:
    value = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))), None)
    return Check(
        name="C++ compiler", ok=value is not None, value=value or "none", needed=False,
        fix="apt install g++ or xcode-select --install: Triton, and packages without a wheel, build with it",
    )  # fmt: skip


def _processor() -> Iterator[Check]:
    import torch

    from tasks.moe.device import cpu_has_bfloat16

    fast = cpu_has_bfloat16()
    yield Check(
        name="bfloat16 on the CPU", ok=fast, value="yes" if fast else "no", needed=False,
        fix="none needed: training on this CPU uses float32, at about half the speed",
    )  # fmt: skip
    gpu = torch.cuda.is_available()
    cpu = f"none, {torch.get_num_threads()} CPU threads"
    yield Check(
        name="GPU", ok=gpu, needed=False,
        value=f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else cpu,
        fix="none needed for the demo; for larger models install the NVIDIA driver and a CUDA build of torch",
    )  # fmt: skip


def _tools() -> Iterator[Check]:
    git = shutil.which("git")
    yield Check(name="git", ok=git is not None, value=git or "none", fix="apt install git")
    pip = importlib.util.find_spec("pip") is not None
    yield Check(
        name="pip", ok=pip, value="yes" if pip else f"not in {sys.prefix}",
        fix="python -m ensurepip: sources in PyPI packages are downloaded by it",
    )  # fmt: skip
    dvc = Path(".dvc").is_dir()
    repository = any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))
    yield Check(
        name="DVC project", ok=dvc and repository,
        value="no .dvc here" if not dvc else "yes" if repository else "in no git repository",
        fix="run from the project's root; in a source archive: git init; elsewhere: git init && dvc init",
    )  # fmt: skip


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Check(
        name="disk", ok=free >= FREE_GB, value=f"{free:.0f} GB free here",
        fix=f"make room: the demo needs {FREE_GB} GB; `dvc gc --workspace` drops old results",
    )  # fmt: skip


def _hub() -> Check:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return Check(
            name="model hub", ok=False, value="HF_HUB_OFFLINE is set", needed=False,
            fix="unset HF_HUB_OFFLINE to use hub: sources; pypi:, npm: and dir: sources work without",
        )  # fmt: skip
    reached = _answers(os.environ.get("HF_ENDPOINT", HUB))
    return Check(
        name="model hub", ok=reached, value="reached" if reached else "not reached", needed=False,
        fix="check the network or proxy, or set HF_ENDPOINT to a mirror; pypi:, npm: and dir: sources work without",
    )  # fmt: skip


def _server() -> Check:
    from prefect.settings import Settings

    url = Settings().api.url
    problem = environment.fault(url) if url else "none set"
    needed = url is not None and environment.is_needed(url)
    value = f"{url} {problem or 'answers'}" if url else "none set"
    own = "none needed: each run starts its own (about 7 s); for schedules and a page: prefect server start"
    return Check(
        name="Prefect server", ok=problem is None, value=value, needed=needed,
        fix=environment.how_to_fix() if needed else own,
    )  # fmt: skip


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="GET"), timeout=5) as answer:
            return bool(answer.status < 400)
    except (urllib.error.URLError, OSError, ValueError):
        return False

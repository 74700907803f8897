"""The one DAG, read from DVC: which stages lead to a target, in what order, and what is out of date in each.

Stages that only digest code (tasks/code.py) are no part of what this file lists. `refresh_code` brings them up to
date, and a stage whose code differs from that of its last run says which modules.

`dvc.repo.Repo` is no public API of DVC; only this file touches it, and a contract test pins what it gives.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flows.environment import variables
from tasks import code

if TYPE_CHECKING:
    from dvc.repo import Repo

META = {"gpu", "retries", "timeout"}
DIGESTS_CODE = "python -m tasks.code "
"""How the command of a stage that only digests code begins."""
CODE = "code"
"""How a reason begins that is not data or settings but code."""
SHOWN_MODULES = 3

T = TypeVar("T")
PATIENCE = 20.0
"""Seconds to wait for DVC's lock: a stage whose run was just killed is still ending (flows/child_process.py)."""


class GraphError(ValueError):
    """dvc.yaml cannot be read, or has no such stage; the message says which."""


class GraphBusyError(GraphError):
    """Another DVC process writes what would be read; the message names it."""


class StageError(RuntimeError):
    """A stage's command failed; the message names it and ends with what it printed last."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of dvc.yaml.

    `needs` are the stages whose outputs it reads; `outs` all that it writes, `in_git` those that git keeps and not
    DVC, `metrics` the JSON files of figures; `gpu` says that it must have the accelerator to itself, `retries` that a
    re-run can differ, `timeout` its minutes.
    """

    name: str
    desc: str
    cmd: str
    needs: tuple[str, ...]
    outs: tuple[Path, ...]
    in_git: tuple[Path, ...]
    metrics: tuple[Path, ...]
    gpu: bool = False
    retries: int = 0
    timeout: float | None = None


def last_stage(pipeline: str) -> str:
    """The stage whose ancestors, with itself, are the pipeline."""
    return f"report@{pipeline}"


def report_page(pipeline: str) -> Path:
    """Where the last stage writes its page."""
    return Path("runs", pipeline, "report", "index.html")


def ancestors(target: str) -> list[Stage]:
    """The stages that `target` needs, and itself, each after those it needs; light ones before those that use the GPU.

    Raises GraphError: dvc.yaml is not valid or has no such stage.
    """
    import networkx

    with _repo() as repo:
        graph = repo.index.graph  # an edge leads from a stage to one that it needs
        by_name = {node.addressing: node for node in graph if not _digests_code(node)}
        if target not in by_name:
            raise GraphError(f"dvc.yaml: no stage {target!r}; it has {', '.join(sorted(by_name)) or 'none'}")
        wanted = {by_name[target], *networkx.descendants(graph, by_name[target])}
        forward = graph.subgraph(node for node in wanted if not _digests_code(node)).reverse()
        order = networkx.lexicographical_topological_sort(
            forward, key=lambda node: (bool((node.meta or {}).get("gpu")), node.addressing)
        )
        return [_stage(node, needs=sorted(n.addressing for n in forward.predecessors(node))) for node in order]


def changes(names: list[str]) -> dict[str, list[str]]:
    """Why each of `names` would run now, such as `dependency tasks/moe: modified`; an up-to-date stage has no reasons.

    A reason that is_code is one too: `code: tasks.moe.counts modified`. Works on a fresh clone, where outputs and
    dependencies are missing. Reads hashes, runs nothing.

    Raises:
        GraphError: dvc.yaml cannot be read.
        code.CodeError: a module cannot be parsed.
    """
    if not names:
        return {}

    def read(repo: Repo) -> dict[str, list[str]]:
        digesting = _code_stages(repo, names)
        status = repo.status(targets=[*names, *digesting])
        digests = {}
        for name, node in digesting.items():
            folder, *modules = node.cmd.removeprefix(DIGESTS_CODE).split()
            for path, module in ((f"{folder}/{module}.json", module) for module in modules):
                digests[path] = code.content(module) if name in status else Path(path).read_text()
        return {
            node.addressing: _reasons(status.get(node.addressing, []), digests) + _code_reasons(repo, node, digests)
            for node in repo.index.stages
            if node.addressing in names
        }

    return _patiently(read)


def is_code(reason: str) -> bool:
    """True if a reason of `changes` is code, or a command, and not data or settings."""
    return reason.startswith((f"{CODE}:", "changed command"))


def refresh_code(names: list[str]) -> None:
    """Let DVC run the stages that digest the code of `names`, as far as they are out of date. Raises StageError."""

    def read(repo: Repo) -> list[str]:
        digesting = list(_code_stages(repo, names))
        return list(repo.status(targets=digesting)) if digesting else []

    if stale := _patiently(read):
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *stale]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables())
        if done.returncode:
            raise StageError(f"{', '.join(stale)}: {(done.stderr or done.stdout).strip()}")


def locked(out: Path) -> str | None:
    """DVC's digest of an output when its stage last ran, by dvc.lock; None if it is not in there."""
    from ruamel.yaml import YAML

    file = Path("dvc.lock")
    stages = (YAML(typ="safe", pure=True).load(file.read_text()) or {}).get("stages", {}) if file.exists() else {}
    outs = (entry for stage in stages.values() for entry in stage.get("outs", []) if entry["path"] == out.as_posix())
    return next((entry["md5"] for entry in outs), None)


def resolve(names: list[str], *, stages: list[Stage]) -> set[str]:
    """Full stage names for what a user typed: `pretrain` or `pretrain@demo`. Raises GraphError for an unknown one."""
    resolved = set()
    for name in names:
        matches = [stage.name for stage in stages if name in (stage.name, stage.name.partition("@")[0])]
        if not matches:
            raise GraphError(f"no stage {name!r} in this pipeline; it has {', '.join(s.name for s in stages)}")
        resolved.update(matches)
    return resolved


def _stage(node: Any, *, needs: list[str]) -> Stage:
    meta = node.meta or {}
    if unknown := set(meta) - META:
        raise GraphError(
            f"dvc.yaml: {node.addressing}: meta.{min(unknown)} is unknown; allowed: {', '.join(sorted(META))}"
        )
    here = Path.cwd()
    outs = {out: Path(out.fs_path).relative_to(here) for out in node.outs}
    return Stage(
        name=node.addressing,
        desc=node.desc or "",
        cmd=node.cmd,
        needs=tuple(needs),
        outs=tuple(outs.values()),
        in_git=tuple(path for out, path in outs.items() if not out.use_cache),
        metrics=tuple(path for out, path in outs.items() if out.metric),
        gpu=bool(meta.get("gpu", False)),
        retries=int(meta.get("retries", 0)),
        timeout=meta.get("timeout"),
    )


def _digests_code(node: Any) -> bool:
    return str(node.cmd).startswith(DIGESTS_CODE)


def _code_stages(repo: Repo, names: list[str]) -> dict[str, Any]:
    """The stages that digest the code of `names`, by name."""
    graph = repo.index.graph
    needed = {need for node in graph if node.addressing in names for need in graph.successors(node)}
    return {need.addressing: need for need in needed if _digests_code(need)}


def _code_reasons(repo: Repo, node: Any, digests: dict[str, str]) -> list[str]:
    """Which modules differ from those of the stage's last run, by the digests that DVC keeps of it.

    Args:
        digests: {path: content} of the files of digests, as the code is now.
    """
    for dep in node.deps:
        now, last = digests.get(dep.def_path), dep.hash_info.value if dep.hash_info else None
        if now is None or last is None or hashlib.md5(now.encode()).hexdigest() == last:
            continue
        kept = Path(repo.cache.local.oid_to_path(last))
        before = json.loads(kept.read_text()) if kept.is_file() else {}
        after = json.loads(now)
        modules = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        shown, more = ", ".join(modules[:SHOWN_MODULES]), len(modules) - SHOWN_MODULES
        return [
            f"{CODE}: {shown}{f' and {more} more' if more > 0 else ''} modified" if before else f"{CODE}: modified"
        ]
    return []


def _reasons(entries: list[Any], digests: dict[str, str]) -> list[str]:
    """What DVC says of a stage, but for its code: `digests` names the files of it."""
    kinds = {"changed deps": "dependency", "changed outs": "output"}
    reasons = []
    for entry in entries:
        if isinstance(entry, str):  # "changed command", "always changed"
            reasons.append(entry)
            continue
        for kind, paths in entry.items():
            if kind == "changed deps" and "new" in paths.values():  # parameters that dvc.lock does not hold yet
                return ["never run"]
            for path, state in paths.items():
                if path in digests:
                    continue
                # A parameter file maps to a state, or to {key: state} of its keys.
                states = state.items() if isinstance(state, dict) else [(path, state)]
                reasons += [
                    f"{'setting' if name != path else kinds.get(kind, kind)} {name}: {s}" for name, s in states
                ]
    return reasons


def _patiently(read: Callable[[Repo], T]) -> T:
    """What `read` gives of DVC's repository, tried again for PATIENCE seconds while another process holds that."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with _repo() as repo:
                return read(repo)
        except GraphBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@contextmanager
def _repo() -> Iterator[Repo]:
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    for name in ("dvc", "dvc_data"):  # above ERROR, DVC draws no progress bars of its own over the display
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        repo = Repo(_wait_for_lock=True)
        try:
            yield repo
        finally:
            repo.close()
    except LockError as error:
        raise GraphBusyError(f"DVC: {error}") from None
    except DvcException as error:
        bare = not any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))
        fix = "; run `git init` there: DVC works in a git repository, and a source archive is none" if bare else ""
        raise GraphError(f"DVC: {error}{fix}") from None

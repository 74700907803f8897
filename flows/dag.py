"""The one DAG, read from DVC: which stages lead to a target, in what order, and what is out of date in each.

    python -m flows.dag report@demo        # print the stages in order, and why each would run

`dvc.repo.Repo` is no public API of DVC; only this file touches it, and a contract test pins what it gives.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.repo import Repo

META = {"gpu", "retries", "timeout"}
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
        by_name = {node.addressing: node for node in graph}
        if target not in by_name:
            raise GraphError(f"dvc.yaml: no stage {target!r}; it has {', '.join(sorted(by_name)) or 'none'}")
        wanted = {by_name[target], *networkx.descendants(graph, by_name[target])}
        forward = graph.subgraph(wanted).reverse()
        order = networkx.lexicographical_topological_sort(
            forward, key=lambda node: (bool((node.meta or {}).get("gpu")), node.addressing)
        )
        return [_stage(node, needs=sorted(n.addressing for n in graph.successors(node))) for node in order]


def changes(names: list[str]) -> dict[str, list[str]]:
    """Why each of `names` would run now, such as `dependency tasks/moe: modified`; an up-to-date stage has no reasons.

    Works on a fresh clone too, where outputs and dependencies are missing. Reads hashes, runs nothing.
    """
    status: dict[str, list[Any]] = {}
    deadline = time.monotonic() + PATIENCE
    while names:
        try:
            with _repo() as repo:
                status = repo.status(targets=names)
            break
        except GraphBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    return {name: _reasons(status.get(name, [])) for name in names}


def locked(out: Path) -> str | None:
    """DVC's digest of an output when its stage last ran, by dvc.lock; None if it is not in there."""
    from ruamel.yaml import YAML

    file = Path("dvc.lock")
    stages = (YAML(typ="safe", pure=True).load(file.read_text()) or {}).get("stages", {}) if file.exists() else {}
    found = (entry for stage in stages.values() for entry in stage.get("outs", []) if entry["path"] == out.as_posix())
    return next((entry["md5"] for entry in found), None)


def resolve(names: list[str], *, stages: list[Stage]) -> set[str]:
    """Full stage names for what a user typed: `pretrain` or `pretrain@demo`. Raises GraphError for an unknown one."""
    found = set()
    for name in names:
        matches = [stage.name for stage in stages if name in (stage.name, stage.name.partition("@")[0])]
        if not matches:
            raise GraphError(f"no stage {name!r} in this pipeline; it has {', '.join(s.name for s in stages)}")
        found.update(matches)
    return found


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


def _reasons(entries: list[Any]) -> list[str]:
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
                # A parameter file maps to a state, or to {key: state} of its keys.
                states = state.items() if isinstance(state, dict) else [(path, state)]
                reasons += [
                    f"{'setting' if name != path else kinds.get(kind, kind)} {name}: {s}" for name, s in states
                ]
    return reasons


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
        mend = "; run `git init` there: DVC works in a git repository, and a source archive is none" if bare else ""
        raise GraphError(f"DVC: {error}{mend}") from None


def main() -> int:
    """Print the stages that lead to a target, and what is out of date."""
    stages = ancestors(sys.argv[1])
    why = changes([stage.name for stage in stages])
    for stage in stages:
        print(f"{stage.name}: {'; '.join(why[stage.name]) or 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

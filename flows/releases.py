"""What of a pipeline is shipped: whole folders that no later run touches, and a link to one of them.

    runs/NAME/release -> releases/ID     what a consumer reads: resolve the link once, then open the files
    runs/NAME/releases/ID/               the model, and release.json, its record
    runs/NAME/refused/ID/                model/, report/, evaluation.json, and refusal.json with the decision
    runs/NAME/accepted.json              the record of the shipped model, in git (quality_gate.py)

ID is the beginning of DVC's digest of runs/NAME/model/. Weights are hard links where the file system has them: a
release takes no place of its own until DVC's cache drops its copy, and lives on then. accepted.json says what is
shipped; the link follows it in one rename, and `settle` makes good what a kill left between the two.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import dag, quality_gate
from flows.quality_gate import Record
from tasks import scratch

KEPT = 3
"""Releases kept, the shipped one and the one before it among them; and as many refused results."""
RECORD, REFUSAL = "release.json", "refusal.json"
_LINKED = 1 << 20
"""Files from so many bytes on are linked. Smaller ones, which people edit, are copied."""


class ReleaseError(ValueError):
    """There is nothing to ship or to go back to; the message says why."""


def present(pipeline: str) -> str:
    """The id of the model that stands in runs/PIPELINE/model, by dvc.lock. Raises ReleaseError if there is none."""
    model = Path("runs", pipeline, "model")
    digest = dag.locked(model)
    if digest is None or not model.is_dir():
        raise ReleaseError(f"{model}: not there, or not in dvc.lock; `moeforge run {pipeline}` makes it")
    return digest[:12]


def shipped(pipeline: str) -> str | None:
    """The id of the release that the link leads to, or None."""
    link = Path("runs", pipeline, "release")
    return link.resolve().name if link.is_symlink() and link.is_dir() else None


def accept(pipeline: str, record: Record) -> Path:
    """Ship the present model, and return its folder. Killed in here, the link leads to a whole one, old or new."""
    new, last = present(pipeline), quality_gate.accepted(pipeline) or {}
    before = last.get("release")
    record = {**record, "release": new, "previous": last.get("previous") if before == new else before}
    folder = _store(pipeline, record)
    _unpublished(pipeline).write_text(new)
    quality_gate.write(quality_gate.record(pipeline), record)
    _point(pipeline, new)
    scratch.discard(_refused(pipeline, new))
    _prune(folder.parent, RECORD, keep={new, record["previous"]})
    return folder


def by_hand(pipeline: str) -> Path:
    """Ship the present model whatever its figures, and return its folder.

    Raises:
        ReleaseError: its figures are not finite, or are not those of what stands there.
    """
    stages = [f"evaluate@{pipeline}", dag.last_stage(pipeline)]
    stale = [f"{stage}: {reason}" for stage, why in dag.changes(stages).items() for reason in why]
    if stale:
        raise ReleaseError(f"{pipeline} is out of date ({'; '.join(stale)}); `moeforge run {pipeline}` first")
    record = quality_gate.present(pipeline)
    decision = quality_gate.decide(record, None, tolerance=0.0)
    if not decision.accepted:
        raise ReleaseError(f"{pipeline}: {decision.why}")
    return accept(pipeline, record)


def refuse(pipeline: str, record: Record, why: str) -> Path:
    """Keep the present result aside with the decision, and return its folder."""
    run, name = Path("runs", pipeline), present(pipeline)
    with _whole(_refused(pipeline, name)) as folder:
        for part in ("model", "report"):
            if (run / part).is_dir():
                _link_all(run / part, folder / part)
        shutil.copyfile(run / "evaluation.json", folder / "evaluation.json")
        quality_gate.write(folder / REFUSAL, {"why": why, **record})
    _prune(run / "refused", REFUSAL, keep={name})
    return run / "refused" / name


def is_decided(pipeline: str) -> bool:
    """True if the present model is the shipped one, or was refused or rolled back."""
    name = present(pipeline)
    return name == (quality_gate.accepted(pipeline) or {}).get("release") or _refused(pipeline, name).is_dir()


def settle(pipeline: str) -> str | None:
    """Let the link follow accepted.json, which a kill or git may have changed alone. Returns what cannot be done."""
    last = quality_gate.accepted(pipeline)
    if last is None or "release" not in last or shipped(pipeline) == last["release"]:
        return None
    if not _release(pipeline, last["release"]).is_dir():
        if dag.locked(Path("runs", pipeline, "model")) is None or present(pipeline) != last["release"]:
            return (
                f"{quality_gate.record(pipeline)}: release {last['release']} is not on this machine; `dvc pull "
                f"{dag.last_stage(pipeline)}` at its commit and `moeforge release {pipeline}` bring it here"
            )
        _store(pipeline, last)
    _point(pipeline, last["release"])
    return None


def rollback(pipeline: str, to: str | None = None) -> tuple[str, str]:
    """Ship the release before the present one, or the one called `to`. What was shipped counts as refused then.

    Returns:
        the ids: what was shipped, what is shipped now.

    Raises:
        ReleaseError: it is not kept.
    """
    last = quality_gate.accepted(pipeline)
    if last is None or "release" not in last:
        raise ReleaseError(f"{pipeline}: nothing was released yet; `moeforge release {pipeline}` ships what is there")
    old, new = last["release"], to or last["previous"]
    others = sorted({path.parent.name for path in _release(pipeline, "").glob(f"*/{RECORD}")} - {old})
    if new not in others:
        wanted = f"release {to!r}" if to else f"release before {old}"
        raise ReleaseError(f"{pipeline}: no {wanted} is kept here; kept besides {old}: {', '.join(others) or 'none'}")
    mark = _refused(pipeline, old) / REFUSAL  # else the next retraining would accept it again
    quality_gate.write(mark, {"why": f"rolled back to {new}", **last})
    quality_gate.write(quality_gate.record(pipeline), json.loads((_release(pipeline, new) / RECORD).read_text()))
    _point(pipeline, new)
    scratch.discard(_refused(pipeline, new))
    return old, new


def is_unpublished(pipeline: str) -> bool:
    """True if the shipped model was accepted here, and git and the DVC remote do not have it yet."""
    marker, last = _unpublished(pipeline), quality_gate.accepted(pipeline)
    return marker.is_file() and last is not None and marker.read_text() == last.get("release")


def mark_published(pipeline: str) -> None:
    """Record that git and the DVC remote have the shipped model."""
    _unpublished(pipeline).unlink(missing_ok=True)


def _store(pipeline: str, record: Record) -> Path:
    target = _release(pipeline, record["release"])
    if target.is_dir():  # whole, since it came by a rename
        quality_gate.write(target / RECORD, record)
        return target
    with _whole(target) as folder:
        _link_all(Path("runs", pipeline, "model"), folder)
        quality_gate.write(folder / RECORD, record)
    return target


def _point(pipeline: str, name: str) -> None:
    link = Path("runs", pipeline, "release")
    staging = link.with_name(f".{link.name}.publishing-{uuid.uuid4().hex}")
    staging.symlink_to(Path("releases", name))
    staging.replace(link)
    scratch.fsync(link.parent)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A new folder that appears at `target` when the block ends, whole and on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(".*.publishing-*"):
        scratch.discard(stale)
    staging = target.with_name(f".{target.name}.publishing-{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        yield staging
        scratch.sync(staging)
        scratch.discard(target)
        staging.rename(target)
        scratch.fsync(target.parent)
    finally:
        scratch.discard(staging)


def _link_all(source: Path, target: Path) -> None:
    def place(file: str, to: str) -> None:
        if Path(file).stat().st_size < _LINKED:
            shutil.copyfile(file, to)
        else:
            scratch.link(Path(file), Path(to))

    shutil.copytree(source, target, copy_function=place, dirs_exist_ok=True)


def _prune(folder: Path, record: str, *, keep: set[str | None]) -> None:
    """Delete the oldest beyond KEPT; never those in `keep`."""
    records = sorted(folder.glob(f"*/{record}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    others = [path.parent for path in records if path.parent.name not in keep]
    for old in others[max(KEPT - (len(records) - len(others)), 0) :]:
        shutil.rmtree(old)


def _release(pipeline: str, name: str) -> Path:
    return Path("runs", pipeline, "releases", name)


def _refused(pipeline: str, name: str) -> Path:
    return Path("runs", pipeline, "refused", name)


def _unpublished(pipeline: str) -> Path:
    return Path("runs", pipeline, "releases", ".unpublished")

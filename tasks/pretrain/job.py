"""What the stage hands to its workers, as a file in the workspace."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks import code, scratch
from tasks.settings import Pretrain

JOB = "job.json"
_FOLDERS = ("corpus", "model", "parent", "mixture", "workspace")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, what is kept and what to try."""


class Diverged(TrainingError):
    """A loss or a gradient is not finite, and what the settings say to do about it does not help."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the stage. Paths are relative to the project's root, where the workers run too."""

    pipeline: str
    params: Pretrain
    corpus: Path
    model: Path
    """The split model, a Hugging Face checkpoint."""
    parent: Path
    """The dense model that it was split from."""
    mixture: Path
    workspace: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """What a caller asks of the hooks of plug-ins, by the plug-in, as JSON values. A user's settings are in params."""

    def write(self) -> Path:
        """Write workspace/job.json, which `read` reads."""
        fields: dict[str, Any] = {name: str(getattr(self, name)) for name in ("pipeline", *_FOLDERS)}
        path = self.workspace / JOB
        scratch.write_json(path, {**fields, "options": self.options, "params": self.params.model_dump()})
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read workspace/job.json. Raises TrainingError if code with other settings wrote it."""
        fields = json.loads(path.read_text())
        try:
            params = Pretrain(**fields["params"])
            folders = {name: Path(fields[name]) for name in _FOLDERS}
        except (KeyError, ValidationError) as error:
            raise TrainingError(
                f"{path} was written by code with other settings ({str(error).splitlines()[0]}); read it with that "
                "code, or train again"
            ) from None
        return cls(pipeline=fields["pipeline"], params=params, options=fields.get("options", {}), **folders)


def code_digest() -> str:
    """Digest of the code that a run imports; comments, docstrings and hints are no part of it."""
    return code.fingerprint("tasks.pretrain")


def code_version() -> str:
    """The git commit (marked `+` when the tree differs from it), or the package's version outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit + ("+" if _git("status", "--porcelain", "--", "tasks", "kernels").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return metadata.version("moeforge")
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout

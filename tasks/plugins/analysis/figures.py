"""The analyses that the settings name, of sparse checkpoints on the windows of an evaluation."""

from __future__ import annotations

from typing import Any

from tasks.evaluate.details import Subject
from tasks.moe import device
from tasks.plugins.analysis import run


def measure(subject: Subject) -> dict[str, Any]:
    """What run.analyse gives, on `evaluate.analysis_windows` windows of each domain; {} if none is asked for."""
    settings: Any = subject.settings
    if not settings.analyses:
        return {}
    print("analyses of experts and routers", flush=True)
    windows = subject.windows(settings.analysis_windows)
    return run.analyse(
        subject.models,
        settings.analyses,
        windows=windows or None,
        folder=subject.folder,
        parent=subject.parent,
        index=subject.index,
        device=device.default(),
        progress=lambda line: print(line, flush=True),
    )

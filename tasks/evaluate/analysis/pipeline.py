"""The analyses of a pipeline: the MoE before and after training, on the windows that the evaluation reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluate.analysis import run
from tasks.moe import device
from tasks.settings import Evaluate


def analyse(
    folder: Path, windows: Mapping[str, np.ndarray], *, knobs: Evaluate, parent: Path, unfinished: Path
) -> dict[str, Any]:
    """The content of analysis.json, as run.analyse gives it; {} if the settings ask for no analysis.

    Args:
        folder: runs/PIPELINE.
        windows: {domain: int [B, L]}, of which `evaluate.analysis_windows` of each domain are taken.
        parent: the dense checkpoint.
        unfinished: where a killed run finds the layers that it has finished.
    """
    if not knobs.analyses:
        return {}
    print("analyses of experts and routers, before and after training", flush=True)
    return run.analyse(
        {"split": folder / "moe", "trained": folder / "trained"},
        knobs.analyses,
        windows={domain: ids_BL[: knobs.analysis_windows] for domain, ids_BL in windows.items()},
        folder=unfinished,
        parent=parent,
        index=folder / "partition.safetensors",
        device=device.default(),
        progress=lambda line: print(line, flush=True),
    )

"""The random states of one process: Python's, NumPy's and torch's, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np


def save() -> dict[str, Any]:
    """This process's states; `restore` puts them back bit for bit."""
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()},
    }


def restore(saved: dict[str, Any]) -> None:
    import torch

    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    states = {
        name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in saved["torch"].items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def reseed(seed: int, *, step: int, rank: int) -> None:
    """Fresh states for a rank that had none at this world size; a function of these three numbers alone."""
    import torch

    words = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))

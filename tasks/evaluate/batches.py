"""How many rows of tokens a forward pass takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from tasks.moe import loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ON_CPU = 4
MOST = 64


def fitting(model: PreTrainedModel, wanted: int | Literal["auto"], *, length: int) -> int:
    """`wanted` itself; for auto, the rows of `length` tokens that fit beside the model, MOST at most.

    On a processor auto is ON_CPU: more rows take memory and save no time. On a GPU it is found by trying, as
    accelerate does.
    """
    if wanted != "auto":
        return wanted
    if model.device.type == "cpu":
        return ON_CPU
    from accelerate.utils import find_executable_batch_size

    def tried(batch_size: int) -> int:
        loss.window_nll(model, np.zeros((batch_size, length), dtype=np.int64), batch=batch_size)
        return batch_size

    found: int = find_executable_batch_size(tried, starting_batch_size=MOST)()
    return found

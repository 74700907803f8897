"""Whether a sparse model places its tokens as its parent does, where a text of a hundred tokens cannot see it.

A sliding window acts on longer texts alone, and some rotary embeddings change behind a position that the config names.
A text of that length costs what the whole model costs on it. So cos, sin and mask are compared by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tasks import architectures
from tasks.moe.streamed import Streamed

LONGEST = 1024
"""Tokens of the identity text at most."""
MASKED = 8192
"""Length of a text at most whose attention mask is compared whole; of longer windows the numbers are compared."""


def difference(moe: Streamed, dense: Streamed, *, layers: Sequence[int] | None = None) -> str | None:
    """Where two models turn queries and keys otherwise, or see other tokens, with the fix; None if nowhere.

    Compared are positions around 0 and every length in the config, and beyond the longest, and the mask of every
    layer for a text that is longer than its window.

    Args:
        layers: the dense model's that the other one has; all by default.
    """
    for end in sorted({64, *_lengths(dense)}):
        positions = torch.arange(max(0, end - 64), end + 64)
        for given, wanted in zip(moe.rotary(positions), dense.rotary(positions), strict=True):
            if given.shape != wanted.shape or not (given - wanted).abs().max() <= 1e-6:
                return (
                    f"the rotary embeddings of positions {positions[0]} to {positions[-1]} are not the dense model's; "
                    "compare rope_parameters, rope_scaling and rope_theta of the two config.json"
                )
    seen: set[tuple[Any, ...]] = set()
    for i, own in enumerate(range(dense.layers) if layers is None else layers):
        places = (moe, i), (dense, own)
        kinds = tuple(_window(*place) for place in places)
        windows = [width for width in kinds if width is not None and width < dense.config.max_position_embeddings]
        if kinds in seen or not windows:
            continue
        seen.add(kinds)
        if max(windows) + 2 > MASKED:
            same = kinds[0] == kinds[1]
        else:
            given, wanted = (_mask(*place, max(windows) + 2) for place in places)
            same = torch.equal(given, wanted)
        if not same:
            return (
                f"layer {i} sees {kinds[0] or 'all'} tokens, the dense model's {kinds[1] or 'all'}; compare "
                "sliding_window, use_sliding_window and layer_types of the two config.json"
            )
    return None


def _window(model: Streamed, i: int) -> int | None:
    """Tokens that layer `i` sees, by its config; None for all."""
    return architectures.windows(model.config)[i]


def _mask(model: Streamed, i: int, length: int) -> torch.Tensor:
    """bool [L, L], True where a token is seen."""
    mask: torch.Tensor | None = model.attention(i, length)["attention_mask"]
    return torch.ones(length, length).tril().bool() if mask is None else mask[0, 0].cpu()


def _lengths(dense: Streamed) -> list[int]:
    """The lengths that the config names, behind which something may change."""
    config = dense.config
    rope = config.rope_parameters.get("original_max_position_embeddings")
    windows = {_window(dense, i) for i in range(dense.layers)}
    return sorted({config.max_position_embeddings, *filter(None, [rope, *windows])})


def text_length(dense: Streamed, *, least: int = 0) -> int:
    """Tokens that a text needs to reach behind the lengths in the config, as far as LONGEST allows, or `least`.

    It does not reach behind a window that spans all positions of the model, which a class without windows may drop.
    """
    whole = [w for w in architectures.windows(dense.config) if w and w >= dense.config.max_position_embeddings]
    reach = max((length + 16 for length in _lengths(dense) if length + 16 <= LONGEST), default=0)
    return min([max(least, reach), *whole])

"""What turns text into ids, all by the same tokenizer.json: the reference (Hugging Face `tokenizers`) and faster ones.

A backend gives the ids of the text alone: special tokens in it are text, and no template adds any.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Flat = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Ids of n texts one after another, and the n + 1 places where they start and end."""


class Backend(Protocol):
    """One implementation of one tokenizer."""

    name: str

    def encode(self, texts: Sequence[str]) -> Flat:
        """Ids of the texts, without separators."""


class Reference:
    """Hugging Face `tokenizers`, 0.23 or 1.x: the ids that every other backend must give."""

    name = "tokenizers"

    def __init__(self, raw: dict[str, Any]) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
        self.tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> Flat:
        batch = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flat([encoding.ids for encoding in batch])


def _flat(lists: list[list[int]]) -> Flat:
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return np.fromiter(itertools.chain.from_iterable(lists), np.uint32, offsets[-1]), offsets

"""What turns text into ids, all by the same tokenizer.json: the reference (Hugging Face `tokenizers`) and faster ones.

A backend gives the ids of the text alone: special tokens in it are text, and no template adds any. Faster ones are
taken only where `probe.py` finds that they agree with the reference.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from importlib import metadata
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
    """Hugging Face `tokenizers`, 0.2x or 1.x: the ids that every other backend must give."""

    def __init__(self, raw: dict[str, Any]) -> None:
        import tokenizers

        self.name = f"tokenizers {tokenizers.__version__}"
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # 1.x reads nothing but files
            file.write(json.dumps(raw))
            file.flush()
            tokenizer: Any = tokenizers.Tokenizer.from_file(file.name)
        if hasattr(tokenizer, "encode_batch_fast"):
            tokenizer.encode_special_tokens = True
            self._encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
        else:  # 1.x
            self._encode = functools.partial(
                tokenizer.encode_batch, add_special_tokens=False, encode_special_tokens=True
            )
        self.decode = functools.partial(tokenizer.decode, skip_special_tokens=False)

    def encode(self, texts: Sequence[str]) -> Flat:
        lists = [encoding.ids for encoding in self._encode(list(texts))]
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return np.fromiter(itertools.chain.from_iterable(lists), np.uint32, offsets[-1]), offsets


class Fastokens:
    """`fastokens`. Its threads are set by FASTOKENS_BPE_THREADS alone, which takes RAYON_NUM_THREADS's value here."""

    def __init__(self, raw: dict[str, Any], *, reference: Reference) -> None:
        if threads := os.environ.get("RAYON_NUM_THREADS"):
            os.environ.setdefault("FASTOKENS_BPE_THREADS", threads)
        import fastokens

        self.name = f"fastokens {metadata.version('fastokens')}"
        self._tokenizer = fastokens.Tokenizer.from_json_str(json.dumps({**raw, "post_processor": None}))
        self._reference = reference

    def encode(self, texts: Sequence[str]) -> Flat:
        try:
            ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        except ValueError:  # a byte that the vocabulary lacks, where the reference drops it
            return self._reference.encode(texts)
        return _flat(ids, offsets)


class Splintr:
    """`splintr-rs`, for byte-level vocabularies.

    Bytes that a vocabulary lacks (SmolLM2's has no 0x04) are dropped by the reference before it merges, and by splintr
    after: documents with one are the reference's.
    """

    def __init__(self, raw: dict[str, Any], *, reference: Reference) -> None:
        import splintr

        self.name = f"splintr-rs {metadata.version('splintr-rs')}"
        if "ByteLevel" not in kinds(raw.get("pre_tokenizer")):
            raise ValueError("it is used for byte-level vocabularies only")
        # It finds special tokens in the text wherever it knows of them.
        plain = [token for token in raw.get("added_tokens") or [] if not token["special"]]
        content = json.dumps({**raw, "added_tokens": plain, "post_processor": None})
        self._tokenizer = splintr.from_json_bytes(content.encode())
        self._missing = [byte for byte, letter in _byte_letters().items() if letter not in raw["model"]["vocab"]]
        self._reference = reference

    def encode(self, texts: Sequence[str]) -> Flat:
        parts = [
            self._reference.encode(list(run)) if lacking else _flat(*self._tokenizer.encode_batch_flat(list(run)))
            for lacking, run in itertools.groupby(texts, key=self._lacks)
        ]
        return join(parts)

    def _lacks(self, text: str) -> bool:
        content = text.encode()
        return any(byte in content for byte in self._missing)


def candidates(raw: dict[str, Any]) -> list[type[Fastokens] | type[Splintr]]:
    """The faster backends for a tokenizer, the fastest first (docs/corpus.md has the rates)."""
    return [Splintr, Fastokens] if "Digits" in kinds(raw.get("pre_tokenizer")) else [Fastokens]


def join(parts: Sequence[Flat]) -> Flat:
    """One result of several."""
    sizes = [np.diff(offsets) for _, offsets in parts]
    offsets = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *sizes]))
    return np.concatenate([np.zeros(0, dtype=np.uint32), *(ids for ids, _ in parts)]), offsets


def kinds(node: Any) -> set[str]:
    """The types of a tokenizer.json component and of those inside it."""
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(kinds, node.values()))
    return set().union(*map(kinds, node)) if isinstance(node, list) else set()


def _flat(ids: bytes, offsets: bytes) -> Flat:
    return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: its own character if that is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(0x100) if byte not in visible)
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(0x100 + i) for i, byte in enumerate(hidden)}}

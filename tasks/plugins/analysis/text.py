"""The text of an analysis: windows by domain, and the kind of each token.

Shapes: B windows of L tokens, T = B x L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("word start", "word continuation", "digits", "punctuation", "whitespace", "part of a character", "special")
LENGTH = 512
_ANCHOR = "a"


@dataclass(frozen=True, kw_only=True)
class Text:
    """`kind_T` is an index into KINDS for each token; None where there is no tokenizer to tell."""

    ids_BL: np.ndarray
    domains: tuple[str, ...]
    domain_T: np.ndarray
    kind_T: np.ndarray | None

    def summary(self) -> dict[str, Any]:
        """tokens, seq_len; windows by domain, and tokens by kind where they are known."""
        length = self.ids_BL.shape[1]
        counted = np.bincount(self.domain_T, minlength=len(self.domains)) // length
        result = {"tokens": self.ids_BL.size, "seq_len": length}
        result["windows"] = dict(zip(self.domains, counted.tolist(), strict=True))
        if self.kind_T is not None:
            result["kinds"] = dict(zip(KINDS, np.bincount(self.kind_T, minlength=len(KINDS)).tolist(), strict=True))
        return result

    def groups(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """{what tokens are grouped by: (names, the number of each token's group, int [T])}."""
        groups = {"domain": (self.domains, self.domain_T)}
        return groups if self.kind_T is None else groups | {"kind of token": (KINDS, self.kind_T)}


def make(windows: Mapping[str, np.ndarray], tokenizer: Path) -> Text:
    """The text of {domain: int [B, L]}, its tokens told apart by a checkpoint folder's tokenizer, if it has one."""
    ids_BL = np.concatenate(list(windows.values())).astype(np.int64)
    sizes = [ids.size for ids in windows.values()]
    return Text(
        ids_BL=ids_BL,
        domains=tuple(windows),
        domain_T=np.repeat(np.arange(len(windows)), sizes),
        kind_T=kinds(tokenizer, ids_BL.reshape(-1)),
    )


def read(path: Path, *, tokenizer: Path, count: int | None = None) -> dict[str, np.ndarray]:
    """The windows of a file, {domain: int64 [B, L]}: at most `count` of each domain.

    Args:
        path: JSON such as heldout.json, {domain: [[ids]]}; or plain text in a file of another name, which becomes one
            domain of windows of LENGTH tokens, or of one shorter window.
        tokenizer: the checkpoint folder whose tokenizer reads plain text.

    Raises:
        ValueError: it holds something else, or windows of several lengths.
    """
    if path.suffix != ".json":
        return {path.stem: _tokenised(path, tokenizer)[:count]}
    try:
        content = json.loads(path.read_text())
        windows = {domain: np.array(ids, dtype=np.int64)[:count] for domain, ids in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not {{domain: [[token ids]]}} with windows of one length ({error})") from None
    shapes = [ids.shape for ids in windows.values()]
    if not shapes or {len(shape) for shape in shapes} != {2} or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(f"{path}: windows of the shapes {shapes}; needed: [windows, length] with one length for all")
    return windows


def _tokenised(path: Path, folder: Path) -> np.ndarray:
    """Windows of a text file, int64 [B, L]; what is left behind the last whole one is dropped."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json, which is to read {path}; give token ids, in a .json file")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = np.array(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"], dtype=np.int64)
    if not len(ids):
        raise ValueError(f"{path}: no text")
    length = min(LENGTH, len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)


def kinds(folder: Path, ids_T: np.ndarray) -> np.ndarray | None:
    """The kind of each token, an index into KINDS; None where the folder has no tokenizer.json.

    A token is read behind a letter, because some tokenizers drop the space of a text's first token.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    distinct, place_T = np.unique(ids_T, return_inverse=True)
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = len(tokenizer.decode(anchor, **decode))
    texts = tokenizer.batch_decode([[*anchor, i] for i in distinct.tolist()], **decode)
    named = [
        "special" if i in special else kind(text[before:]) for i, text in zip(distinct.tolist(), texts, strict=True)
    ]
    numbers: np.ndarray = np.array([KINDS.index(name) for name in named])[place_T.reshape(-1)]
    return numbers


def kind(text: str) -> str:
    """The kind of a token by its text. A token of letters and digits is a word; one without text is special."""
    bare = text.strip()
    if not text:
        return "special"
    if not bare:
        return "whitespace"
    if "\ufffd" in bare:
        return "part of a character"
    if bare.isnumeric():
        return "digits"
    if not any(character.isalnum() for character in bare):
        return "punctuation"
    return "word start" if text[0].isspace() else "word continuation"

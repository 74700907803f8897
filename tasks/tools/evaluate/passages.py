"""The text on which checkpoints are judged: a corpus's test windows, the windows of a heldout.json, or a text file.

Shapes: B windows of a domain, L tokens each.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tasks.corpus.tokenizer import encoder
from tasks.tools.evaluate.checkpoints import Checkpoint

CORPORA, MODELS = Path("data/corpora"), Path("data/models")
_BROKEN = "\ufffd"
"""What a decoder writes for the part of a character that a window's edge cuts off."""


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Windows of token ids, and the folder of the tokenizer that made them."""

    source: str
    """Where they come from, in words."""
    tokenizer: Path
    ids: dict[str, np.ndarray]
    """{domain: int64 [B, L]}."""
    unseen: list[str] = field(default_factory=list)
    """Those of the domains that a corpus calls unseen."""

    @functools.cached_property
    def reference(self) -> encoder.Encoder:
        """The tokenizer that made the ids."""
        return encoder.load_encoder(self.tokenizer)

    @property
    def seq_len(self) -> int:
        """L of the longest windows."""
        return max(int(ids_BL.shape[1]) for ids_BL in self.ids.values())

    def spans(self) -> dict[str, list[list[str]]]:
        """The text of each window, {domain: [B][documents]}: what a model with any tokenizer can be judged on.

        A window is cut where documents end, and separators are left out. A character of which a window has a part
        alone is left out too, so that every model is given the same characters, whose UTF-8 bytes are counted.
        """
        return {domain: [list(self._documents(ids_L)) for ids_L in ids_BL] for domain, ids_BL in self.ids.items()}

    def windows(self, checkpoint: Checkpoint, *, count: int) -> dict[str, np.ndarray]:
        """At most `count` windows of each domain in a checkpoint's own tokens, {domain: int64 [count, L]}.

        With another tokenizer they are cut from the windows' text, and a domain of less than one is left out.
        """
        if encoder.same_ids(checkpoint.tokenizer, self.reference.fingerprint):
            return {domain: ids_BL[:count] for domain, ids_BL in self.ids.items()}
        own, length = encoder.load_encoder(checkpoint.path), min(self.seq_len, checkpoint.positions or self.seq_len)
        texts = {domain: [text for each in spans for text in each] for domain, spans in self.spans().items()}
        flat = {domain: own.encode(some)[0].astype(np.int64) for domain, some in texts.items()}
        cut = {domain: ids[: len(ids) // length * length].reshape(-1, length)[:count] for domain, ids in flat.items()}
        return {domain: ids_BL for domain, ids_BL in cut.items() if len(ids_BL)}

    def _documents(self, ids_L: np.ndarray) -> Iterator[str]:
        separators = [i for i in (self.reference.eos_token_id, self.reference.bos_token_id) if i is not None]
        cuts = np.flatnonzero(np.isin(ids_L, separators))
        for part in np.split(ids_L, cuts):
            words = part[~np.isin(part, separators)]
            if text := self.reference.decode(words.tolist()).strip(_BROKEN):
                yield text


def of_corpus(name: str, *, seq_len: int, windows: int, unseen_windows: int) -> Passages:
    """The test windows of a corpus that was made here, as `tasks.evaluate` takes them.

    Raises:
        ValueError: there is no such corpus, its model is not there, or a domain has no whole window.
    """
    from tasks.corpus import manifest
    from tasks.corpus.sampling import windows as sampling

    folder = CORPORA / name
    made = manifest.load(folder)
    if not encoder.same_ids(encoder.load_encoder(MODELS / made.model).fingerprint, made.tokenizer):
        raise ValueError(f"{MODELS / made.model}: its tokenizer is not that of corpus {name}; make the corpus again")
    unseen = sampling.unseen(folder, seq_len=seq_len, count=unseen_windows)
    ids = sampling.test(folder, seq_len=seq_len, count=windows) | unseen
    return Passages(source=f"test text of corpus {name}", tokenizer=MODELS / made.model, ids=ids, unseen=list(unseen))


def of_file(path: Path, *, seq_len: int, windows: int, tokenizer: Path) -> Passages:
    """Windows of a text file, spread evenly; or those of a heldout.json, as they are.

    Args:
        path: UTF-8 text; or a file called *.json, {domain: [windows of ids]}, with its tokenizer beside it.
        seq_len: L, of a text file.
        windows: at most so many of a text file.
        tokenizer: of a text file: the folder whose tokenizer cuts it into windows.

    Raises:
        ValueError: it is neither, or too short. FileNotFoundError: it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a text file, or the heldout.json of a model's folder")
    if path.suffix == ".json":
        return _heldout(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    one = encoder.load_encoder(tokenizer)
    ids = one.encode([text])[0].astype(np.int64)
    count = min(len(ids) // seq_len, windows)
    if not count:
        raise ValueError(
            f"{path}: has {len(ids)} tokens, not one window of {seq_len}; give more text, or lower --seq-len"
        )
    every = len(ids) // seq_len
    chosen = np.stack([ids[i * every // count * seq_len :][:seq_len] for i in range(count)])
    return Passages(source=str(path), tokenizer=tokenizer, ids={path.stem: chosen})


def _heldout(path: Path) -> Passages:
    try:
        listed = json.loads(path.read_text())
        ids = {str(domain): np.array(rows, dtype=np.int64) for domain, rows in listed.items()}
        sound = bool(ids) and all(rows.ndim == 2 and rows.shape[1] > 1 for rows in ids.values())
    except (ValueError, AttributeError, TypeError, OverflowError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path}: no table of domains and their windows of token ids, as in the heldout.json of a run"
        )
    if not (path.parent / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: the tokenizer of its ids is not beside it; give the one in the folder of a model, such as "
            "runs/NAME/model/heldout.json"
        )
    size = encoder.load_encoder(path.parent).vocab_size
    if outside := next((int(i) for rows in ids.values() for i in (rows.min(), rows.max()) if not 0 <= i < size), None):
        raise ValueError(
            f"{path}: id {outside} is not in the vocabulary of the tokenizer beside it; take both from one model"
        )
    return Passages(source=str(path), tokenizer=path.parent, ids=ids)

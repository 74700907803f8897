"""Text to token ids, by the tokenizer of a model directory.

What stands in a document is text: a document that contains `<|endoftext|>` or `</s>` gets the ids of those characters,
never the special id. The separators around a document are the corpus's choice; nothing else adds a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.records import runs
from tasks.corpus.tokenizer import backends, probe

BATCH_CHARACTERS = 1 << 22
"""A call to the backend gets about this much text, or one longer document: its results are large objects."""

SAMPLE_EVERY = 1000
"""One document of so many is encoded by the reference too, the first among them."""

SAMPLE_CHARACTERS = 1 << 17
"""Of a longer document the next one is taken: the reference needs a second for 2 to 4 MB."""


class TokenizerError(ValueError):
    """A model directory whose tokenizer cannot be used; the message names the file."""


class BackendMismatch(TokenizerError):
    """A backend gave other ids than the reference while the corpus was made."""


class Encoder:
    """A tokenizer ready for corpus text. Made by `load_encoder`; one thread uses it at a time.

    `fingerprint` is `<sha256 of the canonical tokenizer.json>/eos=<id>[/bos=<id>]/<flags>`: what decides the ids. The
    backend is not in it. `checks` counts the strings on which a backend was compared with the reference: before it was
    taken (`probed`), and while it ran (`sampled`).
    """

    def __init__(
        self,
        backend: backends.Backend,
        *,
        reference: backends.Reference,
        digest: str,
        vocab_size: int,
        eos_token_id: int,
        bos_token_id: int | None,
        separators: str,
        probed: int = 0,
    ) -> None:
        self.reference = reference
        self.backend_name = backend.name
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self.checks = {"probed": probed, "sampled": 0}
        self._backend, self._until_sample = backend, 0
        self._bos, self._eos = separators != "eos", separators != "bos"
        bos, flag = (f"/bos={bos_token_id}", "") if self._bos else ("", ",no-bos")
        self.fingerprint = f"{digest}/eos={eos_token_id}{bos}/specials-as-text{flag}{'' if self._eos else ',no-eos'}"

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The narrowest unsigned type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of the texts with their separators: `dtype` [tokens], and where each text starts, int64 [texts + 1].

        The backend uses the cores that RAYON_NUM_THREADS allows; the result doesn't depend on it.

        Raises:
            BackendMismatch: the reference has other ids for a sampled text.
        """
        batches = (texts[first:end] for first, end in runs(map(len, texts), most=BATCH_CHARACTERS))
        ids, offsets = backends.join([self._backend.encode(batch) for batch in batches])
        if self._backend is not self.reference:
            self._sample(texts, (ids, offsets))
        return self._separate(ids, np.diff(offsets))

    def wrap(self, ids: Iterable[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The same of documents that are ids already; a separator that a document has in its place is not doubled.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        documents = [np.asarray(document)[self._inside(document)] for document in ids]
        for document in documents:
            if len(document) and not 0 <= int(document.min()) <= int(document.max()) < self.vocab_size:
                raise TokenizerError(
                    f"id {int(document.max() if document.min() >= 0 else document.min())} in a tokenised document is "
                    f"outside the vocabulary of {self.vocab_size}: it was made with another tokenizer"
                )
        sizes = np.array([len(document) for document in documents], dtype=np.int64)
        return self._separate(np.concatenate([np.zeros(0, dtype=self.dtype), *documents]), sizes)

    def wrap_masks(self, ids: Iterable[NDArray[Any]], masks: Iterable[NDArray[np.bool_] | None]) -> NDArray[np.bool_]:
        """The loss mask of what `wrap(ids)` gives, bool [tokens]; `masks` has one a document, None for all True.

        BOS is no target of a masked document; EOS is one if the token before it is.
        """
        flat: list[NDArray[np.bool_]] = []
        for document, mask in zip(ids, masks, strict=True):
            known = np.ones(len(document), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
            bare = known[self._inside(document)]
            last = bool(bare[-1]) if len(bare) else mask is None
            flat += [np.full(int(self._bos), mask is None), bare, np.full(int(self._eos), last)]
        return np.concatenate([np.zeros(0, dtype=bool), *flat])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens shown."""
        return str(self.reference.decode(list(ids)))

    def _sample(self, texts: Sequence[str], encoded: backends.Flat) -> None:
        ids, offsets = encoded
        for i, text in enumerate(texts):
            self._until_sample -= 1
            if self._until_sample < 0 and len(text) <= SAMPLE_CHARACTERS:
                own = (ids[offsets[i] : offsets[i + 1]], np.array([0, offsets[i + 1] - offsets[i]]))
                if (where := probe.difference(own, self.reference.encode([text]), [text])) is not None:
                    raise BackendMismatch(
                        f"{self.backend_name} differs from {self.reference.name} on {where}; its authors will want "
                        "to know the text"
                    )
                self.checks["sampled"] += 1
                self._until_sample = SAMPLE_EVERY - 1

    def _inside(self, ids: NDArray[Any]) -> slice:
        """A document without the separators of this encoder."""
        start = int(self._bos and len(ids) > 0 and ids[0] == self.bos_token_id)
        stop = len(ids) - int(self._eos and len(ids) > start and ids[-1] == self.eos_token_id)
        return slice(start, stop)

    def _separate(self, ids: NDArray[Any], sizes: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes + (self._bos + self._eos), out=offsets[1:])
        out = np.empty(offsets[-1], dtype=self.dtype)
        text = np.ones(len(out), dtype=bool)
        if self._bos:
            out[offsets[:-1]], text[offsets[:-1]] = self.bos_token_id, False
        if self._eos:
            out[offsets[1:] - 1], text[offsets[1:] - 1] = self.eos_token_id, False
        out[text] = ids
        return out, offsets


def load_encoder(
    model_dir: Path,
    *,
    separators: str = "eos",
    backend: Literal["auto", "reference"] = "reference",
) -> Encoder:
    """Open the tokenizer of a model directory.

    Args:
        separators: `eos` after each document, `bos` before each, or `bos_eos`.
        backend: `auto` takes the fastest that is installed and agrees with the reference.

    Raises:
        TokenizerError: a file lacks something, or a separator has no token.
    """
    raw = _tokenizer_json(model_dir)
    try:
        reference = backends.Reference(raw)
    except Exception as error:  # the library raises no narrower one
        raise TokenizerError(f"{model_dir / 'tokenizer.json'}: not a tokenizer: {error}") from error
    vocabulary = _vocabulary(raw)
    eos, bos = _control(model_dir, "eos", vocabulary), _control(model_dir, "bos", vocabulary)
    if eos is None or (bos is None and separators != "eos"):
        name, fix = ("eos", "ends a document") if eos is None else ("bos", "starts one, or set `separators: eos`")
        raise TokenizerError(
            f"{model_dir / 'tokenizer_config.json'}: {name}_token is not in the vocabulary, and config.json has no "
            f"{name}_token_id; name the token that {fix}"
        )
    rows = _json(model_dir / "config.json").get("vocab_size", 0)
    identity = json.dumps(raw, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    chosen, probed = probe.fastest(raw, reference=reference) if backend == "auto" else (reference, 0)
    return Encoder(
        chosen,
        reference=reference,
        digest=hashlib.sha256(identity.encode()).hexdigest(),
        vocab_size=max(*vocabulary.values(), rows - 1) + 1,
        eos_token_id=eos,
        bos_token_id=bos,
        separators=separators,
        probed=probed,
    )


def same_ids(a: str, b: str) -> bool:
    """Whether two fingerprints mean the same vocabulary, merges and EOS, whatever separators a corpus has."""
    return a.split("/")[:2] == b.split("/")[:2]


def token_bytes(model_dir: Path) -> NDArray[np.int64]:
    """UTF-8 bytes that each id stands for, int64 [vocab]; 0 for special tokens and ids the tokenizer doesn't use.

    Bits per byte of predicted tokens = nats / ln 2 / token_bytes[ids].sum().

    Raises:
        TokenizerError: the vocabulary is neither byte-level nor SentencePiece-like.
    """
    raw = _tokenizer_json(model_dir)
    encoder = load_encoder(model_dir)
    kinds = backends.kinds(raw.get("pre_tokenizer")) | backends.kinds(raw.get("decoder"))
    added = {token["content"]: token["special"] for token in raw.get("added_tokens") or []}
    sizes = np.zeros(encoder.vocab_size, dtype=np.int64)
    for token, i in _vocabulary(raw).items():
        if token in added:
            sizes[i] = 0 if added[token] else len(token.encode())
        elif "ByteLevel" in kinds:
            sizes[i] = len(token)  # the byte-level alphabet writes each byte as one character
        elif kinds & {"Metaspace", "ByteFallback"}:
            sizes[i] = 1 if _is_byte(token) else len(token.replace("▁", " ").encode())
        else:
            raise TokenizerError(
                f"{model_dir / 'tokenizer.json'}: neither a byte-level nor a SentencePiece-like vocabulary "
                f"(found {', '.join(sorted(kinds)) or 'no pre-tokenizer and no decoder'}): bytes per token unknown"
            )
    return sizes


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _vocabulary(raw: dict[str, Any]) -> dict[str, int]:
    """Id of each token, added ones included."""
    own = raw["model"]["vocab"]
    pieces = own if isinstance(own, dict) else {piece: i for i, (piece, _) in enumerate(own)}
    return {**{token["content"]: token["id"] for token in raw.get("added_tokens") or []}, **pieces}


def _tokenizer_json(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "tokenizer.json"
    if not path.exists():
        raise TokenizerError(f"{path}: not found; the model directory needs a `tokenizers` file (a fast tokenizer)")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({error}); fetch the file again (git lfs leaves a pointer)") from None
    # Truncation, padding and dropout are habits of whoever saved it: they cut documents, or make ids random.
    raw = {**raw, "truncation": None, "padding": None}
    if (raw.get("model") or {}).get("dropout"):
        raw["model"]["dropout"] = None
    return raw


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _control(model_dir: Path, name: str, vocabulary: dict[str, int]) -> int | None:
    """Id of the tokenizer's `eos` or `bos` token, else the model's."""
    token = _json(model_dir / "tokenizer_config.json").get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and token in vocabulary:
        return vocabulary[token]
    ids = _json(model_dir / "config.json").get(f"{name}_token_id")
    return ids[0] if isinstance(ids, list) and ids else ids if isinstance(ids, int) else None

"""Text to token ids, by the tokenizer of a model directory (Hugging Face `tokenizers`).

What stands in a document is text: a document that contains `<|endoftext|>` or `</s>` gets the ids of those characters,
never the special id. EOS follows each document; there is no BOS. Other backends can stand behind `Encoder`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenizerError(ValueError):
    """A model directory whose tokenizer cannot be used; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer ready for corpus text.

    `fingerprint` is `<sha256 of the canonical tokenizer.json>/eos=<id>/<flags>/<backend version>`.
    """

    backend: Any
    fingerprint: str
    vocab_size: int
    eos_token_id: int

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The narrowest unsigned type that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Ids of each text, EOS appended. The backend may use every core; the result doesn't depend on it."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_token_id], dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens shown."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


def load_encoder(model_dir: Path) -> Encoder:
    """Open the tokenizer of a model directory. Raises TokenizerError naming the file that lacks something."""
    import tokenizers

    raw = _tokenizer_json(model_dir)
    backend = tokenizers.Tokenizer.from_str(json.dumps(raw))
    backend.encode_special_tokens = True  # specials in a document are text
    eos = _eos(model_dir, backend)
    identity = hashlib.sha256(json.dumps(raw, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())
    flags = "specials-as-text,no-bos"
    return Encoder(
        backend=backend,
        fingerprint=f"{identity.hexdigest()}/eos={eos}/{flags}/tokenizers-{tokenizers.__version__}",
        vocab_size=max(backend.get_vocab_size(with_added_tokens=True), _config(model_dir).get("vocab_size", 0)),
        eos_token_id=eos,
    )


def same_ids(a: str, b: str) -> bool:
    """Whether two fingerprints mean the same vocabulary, merges and flags, whatever version of the backend ran."""
    return a.rpartition("/")[0] == b.rpartition("/")[0]


def token_bytes(model_dir: Path) -> NDArray[np.int64]:
    """UTF-8 bytes that each id stands for, int64 [vocab]; 0 for special tokens and ids the tokenizer doesn't use.

    Bits per byte of predicted tokens = nats / ln 2 / token_bytes[ids].sum().

    Raises:
        TokenizerError: the vocabulary is neither byte-level nor SentencePiece-like.
    """
    raw = _tokenizer_json(model_dir)
    encoder = load_encoder(model_dir)
    kinds = set(_kinds(raw.get("pre_tokenizer"))) | set(_kinds(raw.get("decoder")))
    added = encoder.backend.get_added_tokens_decoder()
    sizes = np.zeros(encoder.vocab_size, dtype=np.int64)
    for token, i in encoder.backend.get_vocab(with_added_tokens=True).items():
        if i in added:
            sizes[i] = 0 if added[i].special else len(added[i].content.encode())
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


def _kinds(node: Any) -> list[str]:
    """The types of a tokenizer.json component and of those inside it."""
    if isinstance(node, dict):
        own = [node["type"]] if isinstance(node.get("type"), str) else []
        return own + [kind for value in node.values() for kind in _kinds(value)]
    return [kind for value in node for kind in _kinds(value)] if isinstance(node, list) else []


def _tokenizer_json(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "tokenizer.json"
    if not path.exists():
        raise TokenizerError(f"{path}: not found; the model directory needs a `tokenizers` file (a fast tokenizer)")
    # Truncation and padding are habits of whoever saved it, and would cut documents.
    return {**json.loads(path.read_text()), "truncation": None, "padding": None}


def _config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _eos(model_dir: Path, backend: Any) -> int:
    path = model_dir / "tokenizer_config.json"
    token = json.loads(path.read_text()).get("eos_token") if path.exists() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and (found := backend.token_to_id(token)) is not None:
        return found
    ids = _config(model_dir).get("eos_token_id")
    first = ids[0] if isinstance(ids, list) else ids
    if first is None:
        raise TokenizerError(
            f"{path}: eos_token = {token!r} is not in the vocabulary; name the token that ends a document"
        )
    return first

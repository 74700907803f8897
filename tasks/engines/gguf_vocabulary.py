"""The tokenizer of a checkpoint as llama.cpp reads it: byte-level BPE, or BPE with SentencePiece's byte tokens.

llama.cpp knows the split before BPE by a name, so tokenizer.json must have one of the splits that it knows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.moe.files import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": ("llama-bpe", True),
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}": ("qwen2", False),
    _TEKKEN: ("tekken", True),
}
"""Regular expression of a Split → llama.cpp's name (llama-vocab.cpp), and whether it then ignores merges."""


def add(writer: GGUFWriter, folder: Path, *, size: int) -> None:
    """Add the tokenizer to a file's metadata.

    Args:
        writer: of the file.
        folder: the checkpoint.
        size: rows of the embedding; tokens that the tokenizer lacks are written as unused.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    import gguf
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ValueError("tokenizer.json is missing; save the tokenizer as a fast one (`save_pretrained`)")
    fields = read_json(folder / "tokenizer.json")
    model = fields["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"tokenizer.json: model.type = {model.get('type')!r}; BPE alone is written")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens, types = _tokens(fields, size=size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks = {merge.replace(" ", "", 1): rank for rank, merge in reversed(list(enumerate(merges)))}
        # llama.cpp joins the pair whose result has the highest score, tokenizers the pair of the first merge
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(_space_before(fields))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(fields))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType[name] for name in types])
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    alone, within = tokenizer("", add_special_tokens=False).input_ids, tokenizer("").input_ids
    added = [token for token in within if token not in alone]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(len(added) > 1 and added[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(fields: dict[str, Any], *, size: int) -> tuple[list[str], list[str]]:
    """Text and type (a name of gguf.TokenType) of each of `size` tokens."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], ["UNUSED"] * size
    bytes_too = fields["model"].get("byte_fallback")
    for token, i in fields["model"]["vocab"].items():
        _require_row(token, i, size=size)
        tokens[i] = token
        types[i] = "BYTE" if bytes_too and re.fullmatch("<0x[0-9A-F]{2}>", token) else "NORMAL"
    for added in fields.get("added_tokens") or []:
        i, token = added["id"], added["content"]
        _require_row(token, i, size=size)
        tokens[i] = token
        types[i] = "UNKNOWN" if token == fields["model"].get("unk_token") and bytes_too else "USER_DEFINED"
        if added["special"] and types[i] != "UNKNOWN":
            types[i] = "CONTROL"
    return tokens, types


def _require_row(token: str, i: int, *, size: int) -> None:
    if i >= size:
        raise ValueError(f"tokenizer.json: token {token!r} has id {i}, but the embedding has {size} rows")


def _split(fields: dict[str, Any]) -> str:
    """llama.cpp's name for the split before byte-level BPE."""
    steps = fields.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    ignores = bool(fields["model"].get("ignore_merges"))
    name = ""
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            name, expected = "gpt-2", False
        elif (
            kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True)
        ):
            name, expected = "smollm", False
        elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            name, expected = _SPLITS.get(steps[0]["pattern"].get("Regex", ""), ("", False))
    normalizer = (fields.get("normalizer") or {}).get("type")
    if not name or expected != ignores or normalizer not in (None, "NFC"):
        shown = json.dumps({key: fields.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        raise ValueError(
            f"tokenizer.json: llama.cpp has no such split of text (ignore_merges = {ignores}): {shown[:400]}; known: "
            f"gpt-2, smollm, {', '.join(each for each, _ in _SPLITS.values())}"
        )
    return name


def _space_before(fields: dict[str, Any]) -> bool:
    """Whether a space is put before the text (SentencePiece's dummy prefix)."""
    steps = [fields.get("normalizer") or {}, fields.get("pre_tokenizer") or {}]
    for step in steps:
        for each in step.get("normalizers") or step.get("pretokenizers") or [step]:
            if each.get("type") == "Prepend" or each.get("prepend_scheme") in ("always", "first"):
                return True
    return False

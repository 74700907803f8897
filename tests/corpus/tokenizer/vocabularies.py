"""Tokenizers of the layouts of LLaMA-2, Llama-3 and SmolLM2, from files their makers publish or from little ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
"""SmolLM2's pre-tokenizer; transformers 5.22 leaves Digits out when it converts the GGUF file."""


def llama2(model: SentencePieceProcessor) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as meta-llama/Llama-2-7b-hf has it."""
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    merges: list[tuple[float, tuple[str, str]]] = []
    for piece, i in vocab.items():
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i)):
            halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            pairs = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
            merges += [(-model.get_score(i), pair) for pair in sorted(pairs, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    ordered = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    tokenizer = Tokenizer(models.BPE(vocab, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = _starts_with(tokenizer, "<s>")
    return tokenizer


def llama3(ranks: Mapping[bytes, int]) -> Tokenizer:
    """tiktoken's ranks, as meta-llama/Meta-Llama-3-8B has them (transformers' TikTokenConverter)."""
    letters = _letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in sorted(vocab, key=vocab.__getitem__):
        halves = [(token[:k], token[k:]) for k in range(1, len(token))]
        pairs = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = _starts_with(tokenizer, "<|begin_of_text|>")
    return tokenizer


def smollm2(raw: dict[str, Any]) -> Tokenizer:
    """A byte-level tokenizer.json with each digit on its own, as HuggingFaceTB/SmolLM2-135M has it."""
    return Tokenizer.from_str(json.dumps({**raw, "pre_tokenizer": DIGITS}))


def save(tokenizer: Tokenizer, folder: Path, *, eos: str, bos: str) -> Path:
    """Write the files of a model directory that an encoder reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": bos}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    return folder


def _starts_with(tokenizer: Tokenizer, token: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def _letters() -> list[str]:
    """The letter of each byte, by GPT-2's own recipe."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters, extra = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in visible else extra))
        extra += byte not in visible
    return letters

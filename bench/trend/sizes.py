"""The sizes of the trend, their start, and the pipelines that each of them needs.

One recipe for all: LLaMAs with heads of 32, trained from scratch by tasks/pretrain; the splits, the children and what
they train on are the demo's, at other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = "text"
SEQ_LEN = 256
BATCH = 8
"""Windows in a step of the training from scratch."""
VOCABULARY = 2048
HEAD = 32
CALIBRATION = 112
"""Windows: as many tokens as the 56 windows of 512 that SmolLM2's splits are fitted to on the same domains."""
RATE = 0.5
"""Peak learning rate of the training from scratch, times the hidden size, of 64 at least."""
HEALING = 24_576
"""Tokens, the demo's."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A dense model and the tokens that it is trained on."""

    hidden: int
    ffn: int
    layers: int
    tokens: int

    @property
    def trained(self) -> int:
        """The tokens, rounded up to whole steps."""
        return -(-self.tokens // (BATCH * SEQ_LEN)) * BATCH * SEQ_LEN

    @property
    def body(self) -> int:
        """Parameters of the layers' matrices."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)


SIZES = {
    "100k": Size(hidden=32, ffn=128, layers=6, tokens=2_000_000),
    "300k": Size(hidden=64, ffn=192, layers=6, tokens=6_000_000),
    "1m": Size(hidden=96, ffn=256, layers=9, tokens=20_000_000),
    "3m": Size(hidden=160, ffn=448, layers=10, tokens=20_000_000),
    "10m": Size(hidden=256, ffn=704, layers=12, tokens=20_000_000),
}
"""An eighth of every FFN, the width of an expert at a quarter, is a multiple of 8."""
SHARES = (25, 50, 75)
"""Of the FFN, in per cent."""


def start_of(name: str) -> str:
    return f"start-{name}"


def dense_of(name: str) -> str:
    return f"dense-{name}"


def cut_of(name: str, share: int) -> str:
    return f"{name}-{share}"


def start(size: Size, folder: Path, *, tokenizer: Path) -> None:
    """Write a model of this size with random weights (N(0, 0.02), seed 0) and the tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tasks.moe import files

    torch.manual_seed(0)
    heads = size.hidden // HEAD
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    files.copy_tokenizer(tokenizer, folder)
    files.save(LlamaForCausalLM(config), folder)


def pipelines(sizes: dict[str, Size]) -> dict[str, dict[str, Any]]:
    """Key -> pipeline: the training from scratch of each size, and a split with its child for each share."""
    made = {}
    for name, size in sizes.items():
        made[dense_of(name)] = _from_scratch(name, size)
        for share in SHARES:
            made[cut_of(name, share)] = _cut(name, size, share)
    return made


def settings(folder: Path, sizes: dict[str, Size], *, heldout: dict[str, float]) -> dict[str, Any]:
    """The content of pipelines.yaml, of all shares.

    Args:
        folder: the project.
        heldout: share of each domain's documents that is not trained on.
    """
    names = [made for name in sizes for made in (start_of(name), dense_of(name))]
    models = {name: {"source": f"dir:{folder / 'data/models' / name}", "license": "Apache-2.0"} for name in names}
    domains = {
        domain: {
            "source": f"dir:{folder / 'text' / domain}.jsonl",
            "format": "jsonl",
            "license": "see the corpus it is from",
            "heldout": share,
        }
        for domain, share in heldout.items()
    }
    corpora = {CORPUS: {"model": start_of(next(iter(sizes))), "domains": domains}}
    return {"models": models, "corpora": corpora, "pipelines": pipelines(sizes)}


def _from_scratch(name: str, size: Size) -> dict[str, Any]:
    return {
        "model": start_of(name),
        "corpus": CORPUS,
        "mixture": {"method": "unimax"},
        "partition": {"method": "random", "experts": 8, "top_k": 4},  # needed by the settings, not run
        "pretrain": {
            "tokens": size.tokens,
            "seq_len": SEQ_LEN,
            "batch": BATCH,
            "micro_batch": BATCH,
            "learning_rate": round(RATE / max(size.hidden, 64), 5),
            "warmup_tokens": size.tokens // 20,
            "eval_tokens": size.tokens // 4,
            "eval_windows": 4,
            "save_every": 100,
            "trackers": [],
        },
        "evaluate": {"seq_len": SEQ_LEN, "windows": 8, "batch": 4},
    }


def _cut(name: str, size: Size, share: int) -> dict[str, Any]:
    return {
        "model": dense_of(name),
        "corpus": CORPUS,
        "control": "dense_child",
        "mixture": {"method": "uniform"},
        "partition": {
            "method": "token_clusters",
            "experts": 8,
            "shared_experts": 1,
            "top_k": 1,
            "expert_size": size.ffn * share // 200,
            "engines": ["transformers"],
            "down_proj": "refit",
            "calibration_windows": CALIBRATION,
        },
        "pretrain": {
            "tokens": HEALING,
            "seq_len": SEQ_LEN,
            "batch": 2,
            "micro_batch": 2,
            "learning_rate": 2e-4,
            "learning_rates": {"router": 4e-7},
            "warmup_tokens": 4096,
            "balance": {"loss": "none"},
            "eval_tokens": HEALING,
            "eval_windows": 1,
            "save_every": 48,
            "trackers": [],
        },
        "evaluate": {"seq_len": SEQ_LEN, "windows": 8, "batch": 4},
    }

"""Checkpoints with random weights: a dense parent, its splits, and a dense child of the same active width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, Mapping[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""SmolLM2-135M; Llama 3.2 1B with 4 of its 16 layers."""
_COMMON: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Experts in place of an FFN: shared ones, and top_k of the routed ones for each token, all of one width."""

    width: int
    shared: int
    top_k: int
    routed: int

    @classmethod
    def of(cls, *, ffn: int, share: float, width: int, shared: int, top_k: int | None, routed: int | None) -> Shape:
        """The shape with `share` percent of the FFN active; without `routed` a split of it. Raises ValueError."""
        active = round(ffn * share / 100)
        chosen = active // width - shared if top_k is None else top_k
        experts = ffn // width - shared if routed is None else routed
        if (routed is None and ffn % width) or (shared + chosen) * width != active or not 0 < chosen <= experts:
            raise ValueError(
                f"--share {share:g} --width {width} --shared {shared} --top-k {chosen}: {shared} + {chosen} experts "
                f"of {width}, {experts} of them routed, for an FFN of {ffn}; --share asks for {active} active neurons"
            )
        return cls(width=width, shared=shared, top_k=chosen, routed=experts)

    def __str__(self) -> str:
        return f"{self.width}x{self.shared}+{self.top_k}of{self.routed}"


def write(folder: Path, sizes: Mapping[str, Any], shapes: Sequence[Shape]) -> dict[str, Path]:
    """Write the parent `dense`, the `child` of the shapes' active width, and each shape, in bfloat16.

    Args:
        folder: is made.
        sizes: config fields of the parent, one of SIZES or like it.
        shapes: of one active width.

    Returns:
        The checkpoints by name.
    """
    width = {(shape.shared + shape.top_k) * shape.width for shape in shapes}
    configs = {"dense": _dense(sizes), "child": _dense({**sizes, "intermediate_size": width.pop()})}
    configs |= {str(shape): _sparse(sizes, shape) for shape in shapes}
    for name, config in configs.items():
        _save(folder / name, config)
    return {name: folder / name for name in configs}


def _dense(sizes: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_COMMON, **sizes)


def _sparse(sizes: Mapping[str, Any], shape: Shape) -> Any:
    from transformers import GraniteMoeSharedConfig, MixtralConfig

    fields: dict[str, Any] = {
        **_COMMON,
        **sizes,
        "intermediate_size": shape.width,
        "num_local_experts": shape.routed,
        "num_experts_per_tok": shape.top_k,
    }
    if not shape.shared:
        return MixtralConfig(**fields, sliding_window=None)
    scale = (fields["hidden_size"] // fields["num_attention_heads"]) ** -0.5
    return GraniteMoeSharedConfig(
        **fields, shared_intermediate_size=shape.shared * shape.width, attention_multiplier=scale
    )


def _save(folder: Path, config: Any) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    from tasks.moe import files

    disable_progress_bar()
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    files.save(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate([*letters, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

"""What the exporters share: one converted layer, what a parent's attention has, and what a class must have for it.

Shapes: D hidden, E routed experts, F neurons per expert, M = S * F neurons of the shared experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tasks.moe.streamed import DENSE
from tasks.settings import Partition

_CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)
_HANDLED = (
    "intermediate_size",
    "mlp_bias",
    "attention_bias",
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "pretraining_tp",  # read by nothing
)
Biases = Literal["", "qkv", "qkvo"]


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """One converted FFN in the stored dtype, for a router whose chosen weights sum to 1: the scale is folded in down.

    The shared experts are one FFN of M neurons that counts with weight 1; None without shared experts.
    """

    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    shared_gate_MD: Tensor | None = None
    shared_up_MD: Tensor | None = None
    shared_down_DM: Tensor | None = None

    @property
    def shared(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """gate, up and down of the shared experts."""
        if self.shared_gate_MD is None or self.shared_up_MD is None or self.shared_down_DM is None:
            return None
        return self.shared_gate_MD, self.shared_up_MD, self.shared_down_DM


class Exporter:
    """One stock class of transformers as the result: what it can express, its config, its names on disk."""

    name: ClassVar[str]
    """model_type of the result."""
    architecture: ClassVar[str]
    biases: ClassVar[tuple[Biases, ...]] = ("",)
    """Which attention biases it can hold."""
    qk_norm: ClassVar[bool] = False
    """Whether its attention has norms on queries and keys; it then has them always."""
    shared: ClassVar[Literal["never", "always", "optional"]] = "never"
    dense_layers: ClassVar[bool] = False
    """Whether some layers may stay dense."""
    window: ClassVar[Literal["none", "uniform", "per layer"]] = "none"
    """Which sliding windows of the attention it can hold."""

    def supports(self, dense: PreTrainedConfig, partition: Partition) -> str | None:
        """None, or why this class cannot give exactly what the parent and the partition ask for."""
        return next(self._reasons(dense, partition), None)

    def _reasons(self, dense: Any, partition: Partition) -> Iterator[str]:
        if dense.model_type not in DENSE:
            yield f"config.json: model_type = {dense.model_type!r} is no dense family known here: {', '.join(DENSE)}"
            return
        if dense.hidden_act != "silu":
            yield f"config.json: hidden_act = {dense.hidden_act!r}; experts are SwiGLU FFNs (silu)"
        if getattr(dense, "mlp_bias", False):
            yield "config.json: mlp_bias = true; no experts have biases"
        if not getattr(dense, "is_causal", True):
            yield "config.json: is_causal = false; the attention of this class is causal"
        known = {field.name for field in fields(PreTrainedConfig)}.union(_CARRIED, _HANDLED)
        for field in fields(type(dense)):
            if field.name not in known and getattr(dense, field.name) != field.default:
                yield f"config.json: {field.name} = {getattr(dense, field.name)!r} has no place in this class"
        found = attention_biases(dense)
        if found not in self.biases:
            has = " and ".join({"": "none", "qkv": "q, k, v", "qkvo": "q, k, v, o"}[b] for b in self.biases)
            yield f"the attention of a {dense.model_type} has biases ({', '.join(found)}); this class's: {has}"
        if (dense.model_type == "qwen3") != self.qk_norm:
            yield f"norms on queries and keys: a {dense.model_type} and this class differ in them"
        seen = windows(dense)
        if self.window == "none" and any(width and width < dense.max_position_embeddings for width in seen):
            yield f"config.json: sliding_window = {dense.sliding_window}; this class attends to the whole text"
        if self.window == "uniform" and len(set(seen)) > 1:
            yield "config.json: layer_types: sliding and full attention alternate, and this class has one kind"
        if self.shared == "never" and partition.shared_experts:
            yield f"partition.shared_experts = {partition.shared_experts}; this class has none"
        if self.shared == "always" and not partition.shared_experts:
            yield "partition.shared_experts = 0; this class is the one with shared experts"
        if not self.dense_layers and len(partition.sparse_layers(dense.num_hidden_layers)) < dense.num_hidden_layers:
            yield f"partition.layers = {partition.layers!r}; this class has no dense layers beside the sparse ones"

    def config(self, dense: PreTrainedConfig, partition: Partition) -> PreTrainedConfig:
        """Config of the result. Raises ValueError if the class cannot express it, or the experts do not fit."""
        if reason := self.supports(dense, partition):
            raise ValueError(f"partition.target = {self.name!r}: {reason}")
        common = {name: copy.deepcopy(getattr(dense, name)) for name in _CARRIED}
        common |= {"num_experts_per_tok": partition.top_k, "output_router_logits": False}
        common |= {"architectures": [self.architecture]}
        return self._config(common, dense, partition=partition)

    def _config(self, common: dict[str, Any], dense: Any, *, partition: Partition) -> PreTrainedConfig:
        raise NotImplementedError

    def layer(self, i: int, sparse: SparseLayer, dense: PreTrainedConfig) -> dict[str, Tensor]:
        """The tensors of the FFN of layer `i`, by their names in published checkpoints of this class."""
        raise NotImplementedError

    def carried(self, dense: PreTrainedConfig, names: Iterable[str]) -> dict[str, str]:
        """Name in the result, by name in the parent, of what is taken over; tensors unknown to the parent's class are
        left out."""
        with torch.device("meta"):
            known = AutoModelForCausalLM.from_config(dense).state_dict()
        return {name: name for name in names if name in known}  # the classes agree outside of the FFN

    def extra(self, i: int, dense: PreTrainedConfig, *, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of layer `i` that this class wants and the parent has not."""
        return {}


def attention_biases(dense: Any) -> Biases:
    """Which projections of the parent's attention have biases."""
    if dense.model_type == "qwen2":
        return "qkv"
    return "qkvo" if dense.model_type != "mistral" and dense.attention_bias else ""


def windows(dense: Any) -> list[int | None]:
    """The sliding window of each layer's attention; None where it spans the whole text."""
    width = None if dense.model_type == "llama" else dense.sliding_window
    if dense.model_type in ("llama", "mistral"):
        return [width] * dense.num_hidden_layers
    return [width if kind == "sliding_attention" else None for kind in dense.layer_types]


def head_dim(dense: Any) -> int:
    """Width of one attention head."""
    return int(getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads)


def odd_head_dim(dense: Any) -> dict[str, int]:
    """head_dim where it is not hidden / heads: not a field of these classes, but their attention reads it."""
    usual = dense.hidden_size // dense.num_attention_heads
    return {} if head_dim(dense) == usual else {"head_dim": head_dim(dense)}

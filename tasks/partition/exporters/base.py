"""What the exporters share: one converted layer, what a parent's attention has, and what a class must have for it.

Shapes: D hidden, E routed experts, F neurons per expert, M = S * F neurons of the shared experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tasks import architectures, layout
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


CLASSES: dict[str, type[Exporter]] = {}
"""The exporter of each model_type, entered when its class is defined."""


class Exporter:
    """One stock class of transformers as the result: what it can express, its config, its names on disk."""

    row: ClassVar[architectures.Sparse]

    def __init_subclass__(cls) -> None:
        CLASSES.setdefault(cls.row.model_type, cls)

    @property
    def name(self) -> str:
        """model_type of the result."""
        return self.row.model_type

    def supports(self, dense: PreTrainedConfig, partition: Partition) -> str | None:
        """None, or why this class cannot give exactly what the parent and the partition ask for."""
        return next(self._reasons(dense, partition), None)

    def _reasons(self, dense: Any, partition: Partition) -> Iterator[str]:
        layers: int = dense.num_hidden_layers
        row = architectures.DENSE.get(dense.model_type)
        if row is None:
            families = ", ".join(architectures.DENSE)
            yield f"config.json: model_type = {dense.model_type!r} is no dense family known here: {families}"
            return
        if dense.hidden_act != "silu":
            yield f"config.json: hidden_act = {dense.hidden_act!r}; experts are SwiGLU FFNs (silu)"
        if getattr(dense, "mlp_bias", False):
            yield "config.json: mlp_bias = true; no experts have biases"
        if not getattr(dense, "is_causal", True):
            yield "config.json: is_causal = false; the attention of this class is causal"
        known = {field.name for field in fields(PreTrainedConfig)}
        known = known.union(_CARRIED, _HANDLED, architectures.MULTIPLIERS)
        for field in fields(type(dense)):
            if field.name not in known and getattr(dense, field.name) != field.default:
                yield f"config.json: {field.name} = {getattr(dense, field.name)!r} has no place in this class"
        biases = architectures.biases(dense)
        if not set(biases) <= set(self.row.biases):
            held = "".join(["none", self.row.biases and f" and {', '.join(self.row.biases)}"])
            yield f"the attention of a {dense.model_type} has biases ({', '.join(biases)}); this class's: {held}"
        if row.multipliers and not self.row.multipliers:
            yield f"a {dense.model_type} has multipliers ({', '.join(architectures.MULTIPLIERS)}); this class has none"
        if row.qk_norm != self.row.qk_norm:
            yield f"norms on queries and keys: a {dense.model_type} and this class differ in them"
        seen = architectures.windows(dense)
        if self.row.window == "none" and any(width and width < dense.max_position_embeddings for width in seen):
            yield f"config.json: sliding_window = {dense.sliding_window}; this class attends to the whole text"
        if self.row.window == "uniform" and len(set(seen)) > 1:
            yield "config.json: layer_types: sliding and full attention alternate, and this class has one kind"
        if partition.elastic and not self.row.unnormalised:
            yield f"partition.elastic = {partition.elastic}: this class divides the weights by the sum of the chosen"
        if not self.row.shared_size and partition.shared_experts:
            yield f"partition.shared_experts = {partition.shared_experts}; this class has none"
        if self.row.shared_always and not partition.shared_experts:
            yield "partition.shared_experts = 0; this class is the one with shared experts"
        if not self.row.dense_layers and len(partition.sparse_layers(layers)) < layers:
            yield f"partition.layers = {partition.layers!r}; this class has no dense layers beside the sparse ones"

    def config(self, dense: PreTrainedConfig, partition: Partition) -> PreTrainedConfig:
        """Config of the result. Raises ValueError if the class cannot express it, or the experts do not fit."""
        if reason := self.supports(dense, partition):
            raise ValueError(f"partition.target = {self.name!r}: {reason}")
        common = {name: copy.deepcopy(getattr(dense, name)) for name in _CARRIED}
        common |= {"num_experts_per_tok": partition.top_k, "output_router_logits": False}
        common |= {"architectures": [self.row.architecture]}
        if partition.elastic:
            common[architectures.ELASTIC] = partition.elastic
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
        """Tensors of layer `i` that this class wants and the parent has not: a bias of o beside q, k and v."""
        if set(architectures.biases(dense)) in (set(), set(self.row.biases)):
            return {}
        return {f"{layout.block(i)}.self_attn.o_proj.bias": torch.zeros(dense.hidden_size, dtype=dtype)}


def odd_head_dim(dense: Any) -> dict[str, int]:
    """head_dim where it is not hidden / heads: not a field of these classes, but their attention reads it."""
    usual = dense.hidden_size // dense.num_attention_heads
    return {} if architectures.head_dim(dense) == usual else {"head_dim": architectures.head_dim(dense)}

"""The checkpoints that LLaMA-MoE v1 (arXiv 2406.16554) and v2 (arXiv 2411.15708) released, by config and tensor names.

Both compute y = sum over the chosen e of scale * p_e * E_e(x), p the softmax over the k largest logits: v1 with a
two-layer gate, v2 with a linear one and, in some models, a residual FFN of weight 1 beside it. What a config asks for
beyond that is refused. Shapes: D hidden, E routed experts, S shared, F neurons per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from tasks import architectures, layout
from tasks.moe import families
from tasks.moe.gate import Gate
from tasks.moe.internals.training_router import NOISE_EPSILON
from tasks.partition.exporters import SparseLayer
from tasks.settings import Partition

Load = Callable[[str], Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_COMMON = {"hidden_act": (("silu",), "experts here are SwiGLU FFNs")}
_V1_FIXED: dict[str, tuple[tuple[Any, ...], str]] = _COMMON | {
    "gate_type": (("TopKBalancedNoisyGate",), "other gates choose otherwise"),
    "gate_network": (("mlp", "linear"), "other gates have other tensors"),
    "gate_use_softmax": ((True,), "without it the raw logits weigh the experts"),
    "gate_noise_epsilon": ((NOISE_EPSILON,), "it is a constant of the gate here"),
    "calculator_type": (("UniversalCalculator",), "other calculators drop tokens, or weigh them otherwise"),
    "multiply_gate_scores": ((True,), "every stock class weighs its experts"),
    "add_weight_norm": ((False,), "its learnt scale has no place in the classes written here"),
}
_V1_IDLE = {
    "num_experts", "num_selects", "size_experts", "score_scale_factor", "gates", "gate_use_balance",
    "gate_balance_loss_weight", "gate_add_noise", "drop_tokens", "dropped_padding", "capacity_factor",
}  # fmt: skip
_V2_FIXED: dict[str, tuple[tuple[Any, ...], str]] = _COMMON | {
    "moe_type": (("modulelist",), "other types have other tensors"),
    "use_attn_moe": ((False,), "none of the classes written here has experts of attention heads"),
    "add_rescale_bias": ((False,), "none of the classes written here has biases in its experts"),
    "rope_scaling": ((None,), "the model's own code ignores it; set it to null if it was trained so"),
}
_V2_MARKS = {"scale_factor", "num_moe_contract_layers", "intermediate_size_residual", "moe_type", "use_attn_moe"}
_V2_IDLE = _V2_MARKS | {
    "num_local_experts", "num_experts_per_tok", "top_k_attn", "attn_experts", "scale_factor_attn",
    "use_layer_wise_balance", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
_V2_DEFAULTS = {
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": 4096,
}  # fmt: skip
_ELSEWHERE = {"model_type", "auto_map", "torch_dtype", "rope_theta", "rope_scaling", "_name_or_path"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One released checkpoint: the model that it was cut from, how, and where its tensors are."""

    name: str
    dense: PreTrainedConfig
    partition: Partition
    scales: list[float]
    """What the experts' weights sum to, by layer."""
    tensors: Shapes
    """Every tensor that the checkpoint must hold."""
    common: Mapping[str, str]
    """Its names of the tensors that the dense model has as well, by their names there."""
    sparse: Callable[[int, Load], tuple[SparseLayer, Gate | None]]
    """One sparse layer, scale folded in, and its two-layer gate; the router is zero where there is a gate."""


def of(raw: Mapping[str, Any], shapes: Shapes) -> Format:
    """The format of a checkpoint.

    Args:
        raw: content of config.json.
        shapes: of the tensors in its files.

    Raises:
        ValueError: it is neither v1 nor v2, or asks for what is not computed here; with field, value and reason.
    """
    if raw.get("model_type") == "llama_moe":
        return _v1(raw, shapes)
    if raw.get("model_type") == architectures.MIXTRAL.model_type and _V2_MARKS & raw.keys():
        return _v2(raw, shapes)
    raise ValueError(
        f"config.json: model_type = {raw.get('model_type')!r} is not imported; known: llama_moe (LLaMA-MoE v1), and "
        f"mixtral with {', '.join(sorted(_V2_MARKS))} (LLaMA-MoE v2). A stock checkpoint needs no import"
    )


def _v1(raw: Mapping[str, Any], shapes: Shapes) -> Format:
    dense = LlamaConfig(**_checked(raw, _V1_FIXED, idle=_V1_IDLE, parent=LlamaConfig))
    experts, top_k = _whole(raw, "num_experts"), _whole(raw, "num_selects")
    layers, width, hidden = dense.num_hidden_layers, dense.intermediate_size, dense.hidden_size
    _experts_fit(experts, shapes, field="num_experts")
    rows = raw.get("size_experts") or [[width // experts] * experts]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"config.json: size_experts = {rows!r}; needed: a list of sizes for each layer")
    sizes = {size for row in rows for size in row}
    if sizes != {width // experts} or width % experts:
        raise ValueError(
            f"config.json: size_experts holds {sorted(sizes)}; experts of one size are imported, here "
            f"intermediate_size / num_experts = {width} / {experts}"
        )
    scales = raw.get("score_scale_factor", 1.0)
    scales = [
        _scale(scale, field="score_scale_factor")
        for scale in (scales if isinstance(scales, list) else [scales] * layers)
    ]
    if len(scales) != layers:
        raise ValueError(f"config.json: score_scale_factor has {len(scales)} entries for {layers} layers")
    linear = raw.get("gate_network", "mlp") == "linear"
    size = width // experts
    shape = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
    tensors = {name: shape for name, shape in families.expected(dense).items() if ".mlp." not in name}
    common = {name: name for name in tensors}
    for i in range(layers):
        mlp = f"{layout.block(i)}.mlp"
        for part, each in shape.items():
            tensors |= {f"{mlp}.calculator.experts.weight_{part}.{e}": each for e in range(experts)}
        if linear:
            tensors[f"{mlp}.gate.gate_network.weight"] = (experts, hidden)
        else:
            tensors[f"{mlp}.gate.gate_network.0.weight"] = (experts, hidden)
            tensors[f"{mlp}.gate.gate_network.2.weight"] = (experts, experts)
        if (noise := f"{mlp}.gate.weight_noise.weight") in shapes:
            tensors[noise] = (experts, hidden)

    def sparse(i: int, load: Load) -> tuple[SparseLayer, Gate | None]:
        mlp, gate = f"{layout.block(i)}.mlp", None
        parts = {
            part: torch.stack([load(f"{mlp}.calculator.experts.weight_{part}.{e}") for e in range(experts)])
            for part in shape
        }
        if linear:
            router_ED = load(f"{mlp}.gate.gate_network.weight")
        else:
            noise = f"{mlp}.gate.weight_noise.weight"
            gate = Gate(
                inner_ED=load(f"{mlp}.gate.gate_network.0.weight"),
                outer_EE=load(f"{mlp}.gate.gate_network.2.weight"),
                noise_ED=load(noise) if noise in tensors else None,
            )
            router_ED = torch.zeros_like(gate.inner_ED)
        down_EDF = _scaled(parts["down"], scales[i])
        return SparseLayer(router_ED=router_ED, gate_EFD=parts["gate"], up_EFD=parts["up"], down_EDF=down_EDF), gate

    partition = Partition(method="random", experts=experts, top_k=top_k)
    return Format(
        name="LLaMA-MoE v1", dense=dense, partition=partition, scales=scales, tensors=tensors, common=common,
        sparse=sparse,
    )  # fmt: skip


def _v2(raw: Mapping[str, Any], shapes: Shapes) -> Format:
    base = _V2_DEFAULTS | _checked(raw, _V2_FIXED, idle=_V2_IDLE, parent=MistralConfig)
    experts, top_k = _whole(raw, "num_local_experts"), _whole(raw, "num_experts_per_tok")
    _experts_fit(experts, shapes, field="num_local_experts")
    size = _whole(raw, "intermediate_size")
    residual = _whole(raw, "intermediate_size_residual") if raw.get("intermediate_size_residual") else 0
    shared = -(-residual // size)
    width = (experts + shared) * size
    # A mistral, for the sliding window that a llama has not; what is narrower than the result's is filled with zeros.
    dense = MistralConfig(**base | {"intermediate_size": width})
    layers, hidden = dense.num_hidden_layers, dense.hidden_size
    contract = _whole(raw, "num_moe_contract_layers") if raw.get("num_moe_contract_layers") else 0
    if 2 * contract >= layers:
        raise ValueError(
            f"config.json: num_moe_contract_layers = {contract} at either end leaves none of num_hidden_layers = "
            f"{layers} with experts"
        )
    sparse_layers = list(range(contract, layers - contract))
    expected = families.expected(dense)
    tensors = {name: shape for name, shape in expected.items() if ".mlp." not in name}
    common = {name: name for name in tensors}
    for i in sorted(set(range(layers)) - set(sparse_layers)):
        for n, part in enumerate(("gate_proj", "down_proj", "up_proj"), 1):
            name = f"{layout.block(i)}.mlp.{part}.weight"
            place = name if name in shapes else f"{layout.block(i)}.block_sparse_moe.w{n}.weight"
            shape = shapes.get(place, expected[name])
            if len(shape) != 2 or shape[0] > expected[name][0] or shape[1] > expected[name][1]:
                raise ValueError(f"{place} is {list(shape)}; a dense layer has at most {list(expected[name])} here")
            common[name], tensors[place] = place, shape
    for i in sparse_layers:
        moe = f"{layout.block(i)}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = (experts, hidden)
        ffns = {f"{moe}.experts.{e}": size for e in range(experts)}
        if residual:
            ffns[f"{layout.block(i)}.mlp_residual"] = residual
        for ffn, neurons in ffns.items():
            tensors |= {f"{ffn}.w{n}.weight": (neurons, hidden) for n in (1, 3)}
            tensors[f"{ffn}.w2.weight"] = (hidden, neurons)
    scale = _scale(raw.get("scale_factor", 1.0), field="scale_factor")

    def sparse(i: int, load: Load) -> tuple[SparseLayer, Gate | None]:
        moe = f"{layout.block(i)}.block_sparse_moe"
        gate_EFD, down_EDF, up_EFD = (
            torch.stack([load(f"{moe}.experts.{e}.w{n}.weight") for e in range(experts)]) for n in (1, 2, 3)
        )
        more: dict[str, Tensor] = {}
        if residual:
            rows = shared * size
            gate, down, up = (load(f"{layout.block(i)}.mlp_residual.w{n}.weight") for n in (1, 2, 3))
            more = {"shared_gate_MD": filled(gate, (rows, hidden)), "shared_up_MD": filled(up, (rows, hidden))}
            more["shared_down_DM"] = filled(down, (hidden, rows))
        return SparseLayer(
            router_ED=load(f"{moe}.gate.weight"), gate_EFD=gate_EFD, up_EFD=up_EFD,
            down_EDF=_scaled(down_EDF, scale), **more,
        ), None  # fmt: skip

    partition = Partition(
        method="activation" if shared else "random", experts=experts, shared_experts=shared, top_k=top_k,
        layers="all" if not contract else sparse_layers,
    )  # fmt: skip
    return Format(
        name="LLaMA-MoE v2", dense=dense, partition=partition, scales=[scale] * layers, tensors=tensors,
        common=common, sparse=sparse,
    )  # fmt: skip


def filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix with zero rows or columns behind its own, up to `shape`: neurons that add nothing."""
    if tuple(tensor.shape) == shape:
        return tensor
    return F.pad(tensor, (0, shape[1] - tensor.shape[1], 0, shape[0] - tensor.shape[0]))


def _scale(value: Any, *, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {field} = {value!r}; needed: a finite number above 0")
    return float(value)


def _experts_fit(experts: int, shapes: Shapes, *, field: str) -> None:
    """Raise ValueError for more experts than there are tensors, before a table of all of them is made."""
    if experts > len(shapes):
        raise ValueError(f"config.json: {field} = {experts}, and the files hold {len(shapes)} tensors")


def _scaled(down_EDF: Tensor, scale: float) -> Tensor:
    scaled_EDF = (down_EDF.float() * scale).to(down_EDF.dtype)
    if not down_EDF.is_meta and not scaled_EDF.isfinite().all():
        raise ValueError(
            f"the down-projections of the experts times their scale {scale} are too large for {down_EDF.dtype}; store "
            "the checkpoint in bfloat16 or float32"
        )
    return scaled_EDF


def _checked(
    raw: Mapping[str, Any],
    fixed: Mapping[str, tuple[tuple[Any, ...], str]],
    *,
    idle: Iterable[str],
    parent: type[PreTrainedConfig],
) -> dict[str, Any]:
    """What of config.json the dense model's config takes over. Raises ValueError for a field that changes the result
    in a way that is not computed here, and for an unknown one."""
    for field, (allowed, why) in fixed.items():
        if field in raw and raw[field] not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise ValueError(f"config.json: {field} = {raw[field]!r} is not imported, only {listed}: {why}")
    known = {field.name for field in fields(parent)} | _ELSEWHERE
    for field in raw:
        if field not in known and field not in fixed and field not in idle and raw[field] not in (None, False):
            raise ValueError(
                f"config.json: {field} = {raw[field]!r} is not known here; delete it from a copy of the checkpoint if "
                "the result does not depend on it"
            )
    dropped = {"model_type", "architectures", "auto_map", "_name_or_path", *idle}
    return {field: value for field, value in raw.items() if field in known - dropped}


def _whole(raw: Mapping[str, Any], field: str) -> int:
    if type(raw.get(field)) is not int or raw[field] < 1:
        raise ValueError(f"config.json: {field} = {raw.get(field)!r}; needed: a whole number of at least 1")
    return int(raw[field])

"""The tensors of a GGUF file, and the tensors of a checkpoint that each is made of.

Shapes: E experts, F neurons of an expert, S of the shared ones together, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import architectures, layout
from tasks.moe import families, gguf
from tasks.moe.internals import rope

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor of the file."""

    shape: Shape
    sources: Mapping[str, Shape]
    """Names and shapes in the checkpoint."""
    make: Callable[[list[Tensor]], Tensor]
    """From the sources, in their order."""


def plan(config: Any) -> dict[str, Made]:
    """Every tensor of the file of a model, by its name there."""
    row, written_as = architectures.row(config), architectures.llama_cpp(config)
    tensors: dict[str, Made] = {}
    if config.rope_parameters["rope_type"] == "llama3":
        scaled, _ = rope.frequencies(config)
        base = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
        tensors["rope_freqs.weight"] = Made(shape=(len(scaled),), sources={}, make=lambda _: base / scaled)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, shape in families.expected(config).items():
        if theirs := gguf.to_gguf(name):
            part = theirs.split(".")[-2]
            make = _interleaved(heads[part]) if written_as and written_as.of_llama and part in heads else _first
            tensors[theirs] = Made(shape=shape, sources={name: shape}, make=make)
    if isinstance(row, architectures.Sparse):
        for i in range(config.num_hidden_layers):
            experts = _granite if row.router == "router" else _one_by_one
            tensors |= {f"blk.{i}.{name}.weight": made for name, made in experts(config, row, layout.block(i))}
    return tensors


def _first(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _interleaved(heads: int) -> Callable[[list[Tensor]], Tensor]:
    """Rows of a query or key projection, or its bias: the pairs of the rotary embedding become neighbours."""

    def make(tensors: list[Tensor]) -> Tensor:
        rows = tensors[0]
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return make


def _same(name: str, *shape: int) -> Made:
    return Made(shape=shape, sources={name: shape}, make=_first)


def _half(name: str, which: int, *shape: int) -> Made:
    """Gate (0) or up (1) out of both in one tensor."""
    *front, rows, columns = shape
    return Made(
        shape=shape,
        sources={name: (*front, 2 * rows, columns)},
        make=lambda tensors: tensors[0].chunk(2, dim=-2)[which],
    )


def _granite(config: Any, row: architectures.Sparse, layer: str) -> Iterator[tuple[str, Made]]:
    """GraniteMoe, with or without shared experts: all experts in one tensor, gate and up together."""
    e, f, d = (getattr(config, name) for name in (row.experts, row.expert_size, "hidden_size"))
    gate_and_up, down = (f"{layer}.block_sparse_moe.{side}_linear.weight" for side in ("input", "output"))
    yield "ffn_gate_inp", _same(f"{layer}.{row.stored_router}", e, d)
    yield "ffn_gate_exps", _half(gate_and_up, 0, e, f, d)
    yield "ffn_up_exps", _half(gate_and_up, 1, e, f, d)
    yield "ffn_down_exps", _same(down, e, d, f)
    if row.shared_size:
        s = getattr(config, row.shared_size)
        yield "ffn_gate_shexp", _half(f"{layer}.shared_mlp.input_linear.weight", 0, s, d)
        yield "ffn_up_shexp", _half(f"{layer}.shared_mlp.input_linear.weight", 1, s, d)
        yield "ffn_down_shexp", _same(f"{layer}.shared_mlp.output_linear.weight", d, s)


def _one_by_one(config: Any, row: architectures.Sparse, layer: str) -> Iterator[tuple[str, Made]]:
    """Mixtral, Qwen2Moe and Qwen3Moe: three tensors an expert."""
    e, f, d = (getattr(config, name) for name in (row.experts, row.expert_size, "hidden_size"))
    block = f"{layer}.{row.stored_router.partition('.')[0]}"
    names = ("w1", "w3", "w2") if row is architectures.MIXTRAL else ("gate_proj", "up_proj", "down_proj")
    yield "ffn_gate_inp", _same(f"{layer}.{row.stored_router}", e, d)
    for theirs, name, shape in zip(("gate", "up", "down"), names, ((f, d), (f, d), (d, f)), strict=True):
        sources = {f"{block}.experts.{i}.{name}.weight": shape for i in range(e)}
        yield f"ffn_{theirs}_exps", Made(shape=(e, *shape), sources=sources, make=torch.stack)
    if row.shared_size:
        s, shared = getattr(config, row.shared_size), f"{block}.shared_expert"
        yield "ffn_gate_shexp", _same(f"{shared}.gate_proj.weight", s, d)
        yield "ffn_up_shexp", _same(f"{shared}.up_proj.weight", s, d)
        sources = {f"{shared}.down_proj.weight": (d, s), f"{shared}_gate.weight": (1, d)}
        yield "ffn_down_shexp", Made(shape=(d, s), sources=sources, make=_ungated)


def _ungated(tensors: list[Tensor]) -> Tensor:
    """The shared down-projection behind a gate that is zero: sigmoid(0) = 1/2, and granitemoe has no gate there."""
    down_DS, gate_1D = tensors
    if gate_1D.count_nonzero():
        raise ValueError(
            "the shared experts' gate is not zero any more: llama.cpp's qwen2moe does not normalise the weights of "
            "chosen experts, and its granitemoe has no such gate; partition with target: granitemoeshared"
        )
    return down_DS / 2

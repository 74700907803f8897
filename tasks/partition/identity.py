"""The proof that a conversion lost nothing: with all experts on, the sparse model gives the dense model's logits.

With a zero router every expert gets the weight 1/E; multiplied by E, and divided by the scale folded into down_proj,
the experts' sum is the dense FFN. The error is the largest absolute difference of logits over the largest absolute
dense logit, in float32 on real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tasks.moe import checkpoint, routing
from tasks.partition import index as index_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""By the dtype of the stored weights: folding a scale that is no power of two rounds bfloat16 weights."""
_TEXT = (
    "The committee met on 14 March to discuss three things: the budget, which had grown; the roof, which leaked; and "
    'a letter from abroad. "We cannot do all of it", said the chair.\n\ndef mean(values):\n    return sum(values) / '
    "len(values)\n\nNothing in this licence grants any right to use a trade mark. In 1869 Mendeleev arranged the "
    "elements by weight, and left gaps where he thought that something was still missing."
)


class IdentityError(ValueError):
    """A conversion that does not reproduce its dense parent."""


@contextmanager
def all_experts(model: PreTrainedModel, *, scale: float) -> Iterator[None]:
    """Inside the block, every expert of every layer contributes with weight 1; afterwards nothing has changed."""
    gates: list[Any] = routing.routers(model)
    experts = model.config.num_local_experts
    saved = [(gate.weight.data, gate.top_k) for gate in gates]

    def full_weight(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index_TK, weights_TK = inputs
        return hidden, index_TK, weights_TK * (experts / scale)

    blocks = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    handles = [block.register_forward_pre_hook(full_weight) for block in blocks]
    try:
        for gate in gates:
            gate.weight.data, gate.top_k = torch.zeros_like(gate.weight.data), experts
        yield
    finally:
        for handle in handles:
            handle.remove()
        for gate, (weight, top_k) in zip(gates, saved, strict=True):
            gate.weight.data, gate.top_k = weight, top_k


def error(moe: PreTrainedModel, dense: PreTrainedModel, ids_BL: np.ndarray, *, scale: float) -> float:
    """Largest absolute difference of the logits over the largest absolute dense logit; inf if there is a NaN."""
    ids = torch.from_numpy(ids_BL).to(dense.device)
    with torch.no_grad(), all_experts(moe, scale=scale):
        expected = dense(input_ids=ids, use_cache=False).logits.float()
        found = moe(input_ids=ids, use_cache=False).logits.float()
    ratio = ((found - expected).abs().max() / expected.abs().max()).item()
    return ratio if ratio == ratio else float("inf")


def require(found: float, stored: torch.dtype) -> None:
    """Raise IdentityError if the error of a checkpoint stored in this dtype is too large."""
    if not found <= TOLERANCE[stored]:
        raise IdentityError(
            f"identity test: with all experts on, the logits differ from the dense model's by {found:.2e} of the "
            f"largest; allowed for {stored}: {TOLERANCE[stored]:.0e}"
        )


def sample_ids(model_dir: Path) -> np.ndarray:
    """A fixed text of four kinds in the model's tokens, int64 [1, L]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return np.array([tokenizer(_TEXT, add_special_tokens=False)["input_ids"]], dtype=np.int64)


def verify_checkpoint(moe_dir: Path, index_path: Path, dense_dir: Path) -> list[str]:
    """Hold a checkpoint of the partition stage against its index and its dense parent, as they lie on disk.

    Returns:
        Problems, each naming the file; empty if the index is a partition of the parent's neurons, every gate and up
        row of an expert is bit for bit the parent's, and the identity test passes.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not readable.
    """
    index = index_file.read(index_path)
    moe = checkpoint.load(moe_dir)
    dense = checkpoint.load(dense_dir)
    stored = moe.dtype
    problems = [f"{index_path}: {text}" for text in index.problems(dense.config.intermediate_size)]
    shape = (moe.config.num_hidden_layers, moe.config.num_local_experts, moe.config.intermediate_size)
    if shape != (len(index.layers), index.experts, index.expert_size):
        problems.append(f"{moe_dir}: (layers, experts, expert size) = {shape}, unlike {index_path}")
    if problems:
        return problems
    problems += [f"{moe_dir}: {text}" for text in _moved_rows(moe, dense, index)]
    moe, dense = moe.float(), dense.float()
    found = error(moe, dense, sample_ids(dense_dir), scale=index.meta["scale"])
    try:
        require(found, stored)
    except IdentityError as failed:
        problems.append(f"{moe_dir}: {failed}")
    return problems


def _moved_rows(moe: PreTrainedModel, dense: PreTrainedModel, index: index_file.Index) -> list[str]:
    """Experts whose gate and up rows are not those of the parent at their indices."""
    blocks: list[Any] = [module for module in moe.modules() if type(module).__name__.endswith("Experts")]
    layers: Any = dense.base_model.layers
    problems = []
    for layer, (block, parent, place) in enumerate(zip(blocks, layers, index.layers, strict=True)):
        routed = torch.from_numpy(place[index.shared_experts :].astype(np.int64))
        expected = torch.cat([parent.mlp.gate_proj.weight[routed], parent.mlp.up_proj.weight[routed]], dim=1)
        wrong = (block.gate_up_proj != expected).flatten(1).any(1).nonzero().flatten().tolist()
        if wrong:
            problems.append(
                f"layer {layer}: gate or up rows of experts {wrong[:5]} are not the parent's at their indices"
            )
    return problems

"""The proof that a conversion lost nothing: with all experts on, the sparse model gives the dense model's logits.

A zero router with top_k = E gives every expert the weight 1/E. The routed down_proj column of neuron n is multiplied
by E / (scale * m_n), a shared one by 1 / m_n, where m_n counts the places of n in that layer: every neuron then counts
once, and the experts' sum is the dense FFN.

    the parent's weights were moved     reference: the parent, less the neurons that the method drops (m_n = 0)
                                        proves: the checkpoint is its parent, cut up
    down_proj refitted, or copies       reference: the parent with the written experts side by side as its FFN
    perturbed                           proves: index, scales, class and all that is carried; verify.py holds the
                                        weights themselves against the parent, row by row

Two runs in one pass: with equal weights, as above, and with the weights that the written router gives when all experts
are chosen. Where top_k = E that is the model as it is used, and its error is held to the same tolerance: such a router
is zero. Where top_k < E the second error is reported. It says how far from equal the router's weights are, which is
what they are for.

A text of a hundred tokens says nothing of a sliding window that is longer, nor of rotary embeddings that change behind
some position. The text is made longer than either where that is cheap, and the positions themselves are compared
(positions.py).

The error is the largest absolute difference of logits over the largest absolute one of the reference. The layers run
in float64: in float32 the order of the neurons alone moves the logits of a 30-layer model by 2e-6 to 9e-6. One layer
of each model is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks import layout
from tasks.moe.internals import layers as internals
from tasks.moe.streamed import Streamed
from tasks.partition import positions
from tasks.partition.index import Index
from tasks.settings import Partition

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
"""By the dtype of the stored weights: folding a scale that is no power of two rounds a down_proj of fewer bits."""
_BATCH = 4
_TEXT = (
    "The committee met on 14 March to discuss three things: the budget, which had grown; the roof, which leaked; and "
    'a letter from abroad. "We cannot do all of it", said the chair.\n\ndef mean(values):\n    return sum(values) / '
    "len(values)\n\nNothing in this licence grants any right to use a trade mark. In 1869 Mendeleev arranged the "
    "elements by weight, and left gaps where he thought that something was still missing."
)


class IdentityError(ValueError):
    """A conversion that does not reproduce its dense parent."""


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """The FFN of a sparse decoder layer of any class; the tensors are views, so writing to them alters the layer.

    M = S * F, which is 0 without shared experts.
    """

    router: Any
    gate_EFD: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor
    shared_gate_MD: torch.Tensor
    shared_up_MD: torch.Tensor
    shared_down_DM: torch.Tensor
    shared_weight: float
    """What the shared experts' output is multiplied by if `zeros` are zero."""
    zeros: tuple[torch.Tensor, ...]
    """What the class has beyond the experts of the index: a gate before the shared ones, neurons that stand idle."""

    def side_by_side(self, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate [P, D], up [P, D], down [D, P] of its P = (S + E) F neurons in the index's order, `scale` taken off.

        With weight 1 on every expert, this is the FFN down (silu(gate x) * up x).
        """
        return (
            torch.cat([self.shared_gate_MD, self.gate_EFD.flatten(0, 1)]),
            torch.cat([self.shared_up_MD, self.up_EFD.flatten(0, 1)]),
            torch.cat(
                [self.shared_down_DM * self.shared_weight, self.down_EDF.transpose(0, 1).flatten(1) / scale], dim=1
            ),
        )


def ffn(block: nn.Module, index: Index) -> Ffn:
    """The parts of a sparse decoder layer's FFN. Raises ValueError for a layer that has no experts."""
    parts = internals.sparse_ffn(block)
    size, switch = index.shared_experts * index.expert_size, parts.shared_switch_1D
    idle = (parts.shared_gate_MD[size:], parts.shared_up_MD[size:], parts.shared_down_DM[:, size:])
    return Ffn(
        router=parts.router,
        gate_EFD=parts.gate_EFD,
        up_EFD=parts.up_EFD,
        down_EDF=parts.down_EDF,
        shared_gate_MD=parts.shared_gate_MD[:size],
        shared_up_MD=parts.shared_up_MD[:size],
        shared_down_DM=parts.shared_down_DM[:, :size],
        shared_weight=1.0 if switch is None else 0.5,  # the sigmoid of 0
        zeros=(*idle, *([] if switch is None else [switch])),
    )


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Largest absolute differences of the logits over the largest absolute logit of the reference; inf for a NaN."""

    equal: float
    """All experts on, with equal weights."""
    as_written: float
    """All experts on, with the weights that the written router gives."""


def errors(moe: Streamed, dense: Streamed, index: Index, ids_BL: np.ndarray, *, parent_weights: bool = True) -> Errors:
    """How far a sparse checkpoint with all experts on is from its reference.

    Args:
        moe: the sparse checkpoint.
        dense: its parent.
        index: what the conversion wrote.
        ids_BL: int64 [B, L] token ids.
        parent_weights: the reference's FFNs hold the parent's weights, or else those written (see above).
    """

    def all_on(layer: int, block: nn.Module) -> None:
        widen(block)
        if layer in index.layers:
            _turn_on(ffn(block, index), index, layer=layer, width=dense.config.intermediate_size)

    def reference(layer: int, block: Any) -> None:
        widen(block)
        if layer not in index.layers:
            return
        times_N = torch.from_numpy(index.times(layer, width=dense.config.intermediate_size))
        if parent_weights:
            block.mlp.down_proj.weight.data[:, times_N.to(block.mlp.down_proj.weight.device) == 0] = 0
            return
        written = ffn(moe.block(layer), index).side_by_side(index.scales[layer])
        place_P = torch.from_numpy(index.layers[layer]).reshape(-1)
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), written, strict=True):
            getattr(block.mlp, name).weight = nn.Parameter(weight.double(), requires_grad=False)
        block.mlp.down_proj.weight.data.div_(times_N[place_P].to(block.mlp.down_proj.weight))

    ids = torch.from_numpy(ids_BL)
    with torch.no_grad():
        expected_BLD = dense.forward(ids, batch=_BATCH, blocks=reference)
        # Of the doubled windows, the first half has equal weights and the second half the router's (_turn_on).
        given_BLD = moe.forward(torch.cat([ids, ids]), batch=2 * len(ids), blocks=all_on)
        differences, largest = [0.0, 0.0], 0.0
        equal_BLD, written_BLD = given_BLD.chunk(2)
        for hidden, *others in zip(expected_BLD, equal_BLD, written_BLD, strict=True):
            expected = dense.logits(hidden)
            largest = max(largest, expected.abs().max().item())
            for run, other in enumerate(others):
                worst = (moe.logits(other) - expected).abs().max().item()
                differences[run] = max(differences[run], float("inf") if worst != worst else worst)
    equal, as_written = (difference / largest if largest else float("inf") for difference in differences)
    return Errors(equal=equal, as_written=as_written)


def widen(block: nn.Module) -> None:
    """Let the FFN of a block compute in float64; all else is the same in both models, and gives the same numbers.

    Experts run by transformers' own loop, which needs no second copy of all their weights.
    """
    internals.run_experts_by_loop(block)
    for name in ("mlp", "block_sparse_moe", "shared_mlp"):
        part: nn.Module | None = getattr(block, name, None)
        if part is not None:
            part.double().register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))


def _turn_on(parts: Ffn, index: Index, *, layer: int, width: int) -> None:
    """Alter a sparse layer so that every expert takes part and every neuron that has a place counts once.

    For the first half of a batch all experts have the same weight: the router sees zeros there.
    """
    experts = len(parts.gate_EFD)
    times_N = torch.from_numpy(index.times(layer, width=width)).to(parts.down_EDF)
    place_PF = torch.from_numpy(index.layers[layer]).to(parts.down_EDF.device)
    parts.router.register_forward_pre_hook(_zero_first_half)
    parts.router.top_k = experts
    routed_EF, shared_M = place_PF[index.shared_experts :], place_PF[: index.shared_experts].reshape(-1)
    parts.down_EDF.mul_((experts / index.scales[layer] / times_N[routed_EF])[:, None])
    parts.shared_down_DM.div_(times_N[shared_M])


def _zero_first_half(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Router logits of zero for the first half of the windows of a batch; its first dimension is windows or tokens."""
    hidden = inputs[0].clone()
    hidden[: len(hidden) // 2] = 0
    return (hidden, *inputs[1:])


def prove(moe: Streamed, dense: Streamed, index: Index, ids_BL: np.ndarray) -> Errors:
    """The errors of a checkpoint, against the reference and the tolerance that its settings and dtype call for.

    Raises:
        IdentityError: one is too large, or the models place their tokens differently.
    """
    if wrong := positions.difference(moe, dense):
        raise IdentityError(f"identity test: {wrong}")
    moved = moves_only(index.options)
    measured = errors(moe, dense, index, ids_BL, parent_weights=moved)
    stored = stored_dtype(dense, index) if moved else torch.float32  # altered weights are compared as written
    require(measured.equal, stored)
    if index.options.all_chosen:
        require(measured.as_written, stored, router="the router as it was written")
    return measured


def require(error: float, stored: torch.dtype, *, router: str = "equal weights") -> None:
    """Raise IdentityError if the error of FFNs stored in this dtype is too large."""
    if not error <= TOLERANCE[stored]:
        raise IdentityError(
            f"identity test: with all experts on and {router}, the logits differ from the dense model's by "
            f"{error:.2e} of the largest; allowed for {stored}: {TOLERANCE[stored]:.0e}"
        )


def moves_only(options: Partition) -> bool:
    """True if the experts hold the parent's own weights: no refitted down_proj, no perturbed copies."""
    return options.down_proj == "keep" and not options.noise and not options.reinitialise


def stored_dtype(dense: Streamed, index: Index) -> torch.dtype:
    """The coarsest dtype of the FFNs that became sparse; the experts are stored in their parents' dtypes."""
    dtypes = {dense.stored[name].dtype for i in index.layers for name in layout.ffn(i)}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def sample_ids(dense: Streamed) -> np.ndarray:
    """A fixed text of four kinds in the model's tokens, as long as positions.text_length says, int64 [1, L]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense.folder, local_files_only=True)
    ids = np.array(tokenizer(_TEXT, add_special_tokens=False)["input_ids"], dtype=np.int64)
    return np.resize(ids, (1, positions.text_length(dense, least=len(ids))))

"""The physical cut: a dense checkpoint of the units that masks keep, written tensor by tensor, and its proof.

    metrics = cut(parent, keep, sizes, folder=work / "pruned", report=print)

The factors of the masks are folded into the weights: those of hidden dimensions into the embedding, the head, and the
rows of o_proj and down_proj; those of layers into the same rows; those of groups of heads into the columns of o_proj;
those of neurons into the columns of down_proj. A tied matrix is folded once. The result is a plain checkpoint of the
parent's own class.

Shapes: B windows, T tokens of one, L layers, K groups of heads, N neurons, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks import architectures, layout
from tasks.moe import families, files
from tasks.moe.streamed import Streamed
from tasks.moe.writer import ShardWriter
from tasks.partition import identity, positions
from tasks.partition.identity import IdentityError
from tasks.partition.pruned import parent_config, require_equal
from tasks.plugins.masks import masked, settings, units
from tasks.plugins.masks.masked import Keep


@torch.no_grad()
def cut(
    parent: Streamed, keep: Keep, sizes: Mapping[str, int], *, folder: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """Write the units that are kept as a checkpoint with tokenizer, and prove that it is the masked parent.

    Args:
        keep: of each kind as many units as `sizes` has, in each layer.
        folder: created here.
        report: called for every layer that is kept.

    Returns:
        layers: the parent's that are kept; identity_error.

    Raises:
        ValueError: a tensor of the parent is missing or unknown.
        IdentityError: the written checkpoint is not what was cut. It is left for whoever looks for the reason.
    """
    folded = Folded(parent, keep)
    config = _config(parent, sizes, layers=folded.layers)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    origin: dict[str, str] = {}
    for name, shape in families.expected(config).items():
        layer = layout.layer_of(name)
        origin[name] = name
        if layer is not None:
            origin[name] = name.replace(layout.block(layer), layout.block(folded.layers[layer]), 1)
        plan[name] = parent.stored[origin[name]].dtype, shape
    folder.mkdir()
    at = -1
    with ShardWriter(folder, plan) as writer:
        for name in plan:
            if (layer := layout.layer_of(name)) is not None and layer != at:
                at = layer
                parent.prefetch(folded.layers[at])
                report(f"layer {folded.layers[at]} of the parent")
            writer.write(name, folded.cut(origin[name]))
    files.write_config(config, folder)
    files.copy_tokenizer(parent.folder, folder)
    files.copy_documents(parent.folder, folder)
    error = prove(Streamed(folder, device=parent.device), folded)
    return {"layers": folded.layers, "identity_error": error}


@dataclass(frozen=True)
class Folded:
    """The tensors of a parent with the factors of its masks."""

    parent: Streamed
    keep: Keep

    @property
    def layers(self) -> list[int]:
        """The layers that are kept."""
        layer_L = self.keep.layer_L
        return list(range(self.parent.layers)) if layer_L is None else layer_L.nonzero().flatten().tolist()

    def tensor(self, name: str) -> Tensor:
        """A tensor in the stored dtype and size; of what it writes, units that are cut are 0."""
        weight = self.parent.tensor(name)
        for dim, factors in enumerate(self._factors(name)):
            if factors is not None:
                shaped = factors.view([-1 if i == dim else 1 for i in range(weight.ndim)])
                weight = (weight.float() * shaped).to(weight.dtype)
        return weight

    def cut(self, name: str) -> Tensor:
        """What is left of a tensor, of a layer that is kept."""
        weight, layer = self.tensor(name), layout.layer_of(name)
        for dim, axis in enumerate(units.axes(name)):
            mask = None if axis is None else self._mask(axis, layer, weight.shape[dim])
            if mask is not None:
                weight = weight.index_select(dim, mask.nonzero().flatten())
        return weight

    def _mask(self, axis: units.Axis, layer: int | None, size: int) -> Tensor | None:
        if axis == "hidden":
            return self.keep.hidden_D
        masks = self.keep.neuron_LN if axis == "neurons" else self.keep.group_LK
        if masks is None:
            return None
        assert layer is not None
        return masks[layer].repeat_interleave(size // masks.shape[1])

    def _factors(self, name: str) -> tuple[Tensor | None, ...]:
        """What each axis of a tensor is multiplied with."""
        part, kind = name.split(".")[-2:]
        layer = layout.layer_of(name)
        if part in ("embed_tokens", "lm_head"):
            return None, self.keep.hidden_D
        if part not in ("o_proj", "down_proj") or layer is None:
            return ()
        written_D = self.keep.written(layer)
        if written_D is not None:
            written_D = written_D.expand(self.parent.config.hidden_size)
        if kind == "bias":
            return (written_D,)
        axis: units.Axis = "queries" if part == "o_proj" else "neurons"
        return written_D, self._mask(axis, layer, self.parent.stored[name].shape[1])


def _config(parent: Streamed, sizes: Mapping[str, int], *, layers: list[int]) -> Any:
    """The pruned model's config. Raises ValueError if the parent has other tensors than its own."""
    config = parent_config(parent)
    kinds = getattr(config, "layer_types", None)
    for field, value in settings.changes(config.to_dict(), sizes).items():
        setattr(config, field, value)
    if kinds:
        config.layer_types = kinds = [kinds[i] for i in layers]
        if hasattr(config, "max_window_layers"):  # by which transformers 4 tells them apart
            full = (i for i, kind in enumerate(kinds) if kind == "sliding_attention")
            config.max_window_layers = next(full, len(kinds))
    return config


@torch.no_grad()
def prove(model: Streamed, folded: Folded) -> float:
    """Prove that a pruned model is its parent under masks, the weights with the masks' factors in both.

    Returns:
        The largest difference of logits over the largest logit of the reference, all but norms in float64.

    Raises:
        IdentityError: it is above TOLERANCE, or the two place their tokens differently.
    """
    if wrong := positions.difference(model, folded.parent, layers=folded.layers):
        raise IdentityError(f"pruned model: {wrong}")
    ids = torch.from_numpy(identity.sample_ids(model))
    expected = _logits(folded.parent, ids, tensor=folded.tensor, keep=folded.keep.binary())
    own = _logits(model, ids, tensor=model.tensor, keep=Keep())
    return require_equal(own, expected, reference="the masked parent")


def _logits(model: Streamed, ids_BT: Tensor, *, tensor: Callable[[str], Tensor], keep: Keep) -> Tensor:
    """Logits [B, T, V] of a model with these tensors in place of its own, under masks, layer by layer."""

    def wide(name: str) -> Tensor:
        return tensor(name).to(model.device, torch.float64)

    on_device = Keep(**{name: None if mask is None else mask.to(model.device) for name, mask in vars(keep).items()})
    scale = architectures.multipliers(model.config)
    embedding = wide(layout.EMBEDDINGS)
    hidden_BTD = F.embedding(ids_BT.to(model.device), embedding) * scale["embedding_multiplier"]
    for i in range(model.layers):
        block = model.block(i).double()
        for name, parameter in block.named_parameters():
            parameter.data = wide(f"{layout.block(i)}.{name}")
        masked.attach_to_layer(block, i, lambda: on_device)
        where = model.attention(i, ids_BT.shape[1])
        where["position_embeddings"] = tuple(part.double() for part in where["position_embeddings"])
        hidden_BTD = block(hidden_BTD, **where)
        del block
    norm = model.norm().double()
    norm.weight.data = wide(layout.NORM)
    masked.attach_to_norm(norm, lambda: on_device)
    head = wide(layout.HEAD) if layout.HEAD in model.stored else embedding
    return F.linear(norm(hidden_BTD), head) / scale["logits_scaling"]

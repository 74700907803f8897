"""The setting `control` of a pipeline: the dense child, and how it is cut (tasks/control)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from tasks import architectures
from tasks.settings.fields import Frozen, Positive
from tasks.settings.partition import Partition

MOST = 0.98
"""Share of a kind of unit that learned masks can be led to cut; their logits have limits."""


class ChildShape(Frozen):
    """Sizes of the dense child, by the fields of config.json.

    What is left out has the parent's size, and `intermediate_size` the neurons that a token passes in the sparse
    model. Query heads are cut with the head of keys and values that they read.
    """

    num_hidden_layers: Positive | None = None
    num_key_value_heads: Positive | None = None
    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None


class Control(Frozen):
    method: Literal["static", "hard_concrete", "magnitude", "random"] = "static"
    """static: the neurons of each FFN with the largest energy on the calibration text, refitted as the split is.
    hard_concrete: what masks keep that are trained with the parent (arXiv 2310.06694). magnitude, random: the units
    with the largest weights, or any; baselines."""
    shape: ChildShape = ChildShape()
    tokens: Positive | None = None
    """On which `hard_concrete` trains masks and parent together, before the child has the sparse model's batches."""
    parent: bool = False
    """Also train the parent on these batches, and judge it: what the text alone gives."""

    @model_validator(mode="after")
    def _tokens(self) -> Self:
        if (self.method == "hard_concrete") != (self.tokens is not None):
            raise ValueError(
                "method `hard_concrete` needs `tokens`, on which the masks are trained; no other takes it"
            )
        return self

    def sizes(self, dense: Mapping[str, Any], partition: Partition) -> dict[str, int]:
        """The child's sizes, by the fields of ChildShape.

        Args:
            dense: the parent's config.json.

        Raises:
            ValueError: there is no such child; the message begins with the field of `control`, or with dense_child.
        """
        own = _sizes(dense)
        asked = self.shape.model_dump(exclude_none=True)
        if "intermediate_size" not in asked:
            width, layers = own["intermediate_size"], own["num_hidden_layers"]
            asked["intermediate_size"] = partition.child_width(width, layers=layers)
        if unknown := sorted(asked.keys() - own.keys()):
            raise ValueError(f"shape.{unknown[0]}: the parent's config.json has no such field; leave it out")
        sizes = own | asked
        for field, size in sizes.items():
            cut = 1 - size / own[field]
            if cut < 0:
                raise ValueError(f"shape.{field} = {size}: the parent has {own[field]}; set it to that or less")
            if cut > MOST and self.method == "hard_concrete":
                raise ValueError(
                    f"shape.{field} = {size}: the parent has {own[field]}, and masks can be led to cut {MOST:.0%} of "
                    "them at most; raise it, or set method: magnitude"
                )
            if cut and field != "intermediate_size" and self.method == "static":
                raise ValueError(
                    f"shape.{field} = {size}: the parent has {own[field]}, and method `static` cuts FFNs alone; set "
                    "method: hard_concrete"
                )
        if sizes == own:
            raise ValueError("shape: it is the parent's own, so nothing is cut; lower a size")
        _check_heads(dense, sizes)
        return sizes

    def config(self, dense: Mapping[str, Any], partition: Partition) -> dict[str, Any]:
        """The child's config.json, as if the first layers were kept. Raises ValueError as `sizes` does."""
        return {**dense, **fields(dense, self.sizes(dense, partition))}


def fields(dense: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of config.json that differ between a parent and a child of these sizes.

    Layers with attention of different kinds are not told apart here.
    """
    own = _sizes(dense)
    changed: dict[str, Any] = {field: size for field, size in sizes.items() if size != own[field]}
    if "num_key_value_heads" in changed or "hidden_size" in changed:
        changed["num_attention_heads"] = _heads(dense, sizes)
        if architectures.DENSE[dense["model_type"]].head_dim:
            changed["head_dim"] = _head_dim(dense)
    if dense.get("layer_types") and "num_hidden_layers" in changed:
        changed["layer_types"] = dense["layer_types"][: changed["num_hidden_layers"]]
    return changed


def _check_heads(dense: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raise ValueError if heads and hidden size do not go together in the parent's class."""
    own = _sizes(dense)
    if all(sizes.get(field) == own.get(field) for field in ("hidden_size", "num_key_value_heads")):
        return
    hidden, heads, head_dim = sizes["hidden_size"], _heads(dense, sizes), _head_dim(dense)
    row = architectures.DENSE[dense["model_type"]]
    each = f"{heads} heads of {head_dim} ({heads // sizes['num_key_value_heads']} to a head of keys and values)"
    if not row.head_dim and hidden != heads * head_dim:
        raise ValueError(
            f"shape.hidden_size = {hidden}: a {row.model_type} has no `head_dim`, so its {each} need hidden_size = "
            f"{heads * head_dim}; change both in step"
        )
    if hidden % heads:
        raise ValueError(
            f"shape.hidden_size = {hidden}: it is no multiple of the {each}, which transformers asks for; nearest: "
            f"{max(hidden // heads, 1) * heads}"
        )


def _sizes(dense: Mapping[str, Any]) -> dict[str, int]:
    whole = {**dense, "num_key_value_heads": dense.get("num_key_value_heads") or dense.get("num_attention_heads")}
    return {field: whole[field] for field in ChildShape.model_fields if whole.get(field)}


def _heads(dense: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Query heads of a child."""
    return int(sizes["num_key_value_heads"] * dense["num_attention_heads"] // _sizes(dense)["num_key_value_heads"])


def _head_dim(dense: Mapping[str, Any]) -> int:
    return int(dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"])

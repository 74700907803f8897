"""The settings of pruned baselines of any shape, and the sizes that a dense class can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.settings.fields import Positive

if TYPE_CHECKING:
    from tasks.settings import Control, Pipeline

FIELDS = {
    "control": {"tokens": (Positive | None, None)},
    "control.shape": dict.fromkeys(
        ("num_hidden_layers", "num_key_value_heads", "hidden_size"), (Positive | None, None)
    ),
}
"""tokens: on which `hard_concrete` trains masks and parent together, before the pruned model has the sparse model's
batches. Query heads are cut with the head of keys and values that they read."""
CHOICES = {"control.method": ("hard_concrete", "magnitude", "random")}
"""hard_concrete: what masks keep that are trained with the parent. magnitude, random: the units with the largest
weights, or any."""
SIZES = ("num_hidden_layers", "num_key_value_heads", "hidden_size", "intermediate_size")
MOST = 0.98
"""Share of a kind of unit that learned masks can be led to cut; their logits have limits."""
FEWEST_STEPS = 20
"""Of masks, whose targets grow over a fifth of the steps."""


def faults(pipeline: Pipeline, **_: Any) -> Iterator[str]:
    """`tokens` without the method that takes them, or too few."""
    control: Any = pipeline.pruned
    if control is None:
        return
    tokens, step = control.tokens, pipeline.pretrain.step_tokens
    if (control.method == "hard_concrete") != (tokens is not None):
        yield "control: method `hard_concrete` needs `tokens`, on which the masks are trained; no other takes it"
    elif tokens is not None and tokens < FEWEST_STEPS * step:
        yield (
            f"control.tokens = {tokens}: masks need {FEWEST_STEPS} steps of batch x seq_len = {step} tokens at least; "
            f"raise it to {FEWEST_STEPS * step}"
        )


def config(control: Control, dense: Mapping[str, Any], asked: Mapping[str, int]) -> dict[str, Any]:
    """The pruned model's config.json, as if the first layers were kept.

    Args:
        dense: the parent's config.json.
        asked: sizes by the fields of `control.shape`; what is left out has the parent's size.

    Raises:
        ValueError: there is no such model; the message begins with the field of `control`.
    """
    parent = own(dense)
    if unknown := sorted(asked.keys() - parent.keys()):
        raise ValueError(f"shape.{unknown[0]}: the parent's config.json has no such field; leave it out")
    sizes = parent | dict(asked)
    for field, size in sizes.items():
        if 1 - size / parent[field] > MOST and control.method == "hard_concrete":
            raise ValueError(
                f"shape.{field} = {size}: the parent has {parent[field]}, and masks can be led to cut {MOST:.0%} of "
                "them at most; raise it, or set method: magnitude"
            )
    _check_heads(dense, sizes)
    return {**dense, **changes(dense, sizes)}


def changes(dense: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of config.json that differ between a parent and a pruned model of these sizes.

    Layers with attention of different kinds count as alike here.
    """
    parent = own(dense)
    changed: dict[str, Any] = {field: size for field, size in sizes.items() if size != parent[field]}
    if "num_key_value_heads" in changed or "hidden_size" in changed:
        changed["num_attention_heads"] = _heads(dense, sizes)
        if architectures.DENSE[dense["model_type"]].head_dim:
            changed["head_dim"] = _head_dim(dense)
    if dense.get("layer_types") and "num_hidden_layers" in changed:
        changed["layer_types"] = dense["layer_types"][: changed["num_hidden_layers"]]
    return changed


def _check_heads(dense: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raise ValueError if heads and hidden size do not go together in the parent's class."""
    parent = own(dense)
    if all(sizes.get(field) == parent.get(field) for field in ("hidden_size", "num_key_value_heads")):
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


def own(dense: Mapping[str, Any]) -> dict[str, int]:
    """A model's sizes, by the fields of `control.shape`."""
    whole = {**dense, "num_key_value_heads": dense.get("num_key_value_heads") or dense.get("num_attention_heads")}
    return {field: whole[field] for field in SIZES if whole.get(field)}


def _heads(dense: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Query heads of a pruned model."""
    return int(sizes["num_key_value_heads"] * dense["num_attention_heads"] // own(dense)["num_key_value_heads"])


def _head_dim(dense: Mapping[str, Any]) -> int:
    return int(dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"])

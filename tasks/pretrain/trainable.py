"""The parts of a model, which of them are trained, and their optimizer groups.

A part is decided by the module that a parameter stands in (its class, and what stands around it), not by its name, so
that it is the same for every class of tasks/moe and for the modules that DeepSpeed's AutoEP puts in their place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from tasks import architectures
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain
from tasks.settings.pretrain import Part, What

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

TRAINED: dict[What, Sequence[Part]] = {
    "router": ("router",),
    "experts": ("router", "experts", "shared"),
    "all": get_args(Part),
}
"""The parts that a phase trains. The shared experts are among the experts: the split cut one FFN into both."""


def parts(model: PreTrainedModel) -> dict[str, Part]:
    """The part of every parameter, by its name in `named_parameters()`, in that order; a tied matrix comes once.

    router: routers, two-layer gates and their noise. experts: the routed ones. shared: shared experts and their gate.
    ffn: the FFN of a dense layer. attention, norms: all of them, a norm inside attention too. embeddings: the tokens'
    and the head. A plug-in's module names its part itself (`optimizer_part`).

    Raises:
        TrainingError: a parameter stands in no module that is known here.
    """
    head = model.get_output_embeddings()
    part_of: dict[str, Part] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, around: Part | None) -> None:
        part = _part(module, head=head, around=around)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            if part is None:
                raise TrainingError(
                    f"{prefix}{name}, a parameter of {type(module).__name__}, belongs to none of the parts "
                    f"{', '.join(get_args(Part))}; add its class to tasks/pretrain/trainable.py"
                )
            seen.add(id(parameter))
            part_of[prefix + name] = part
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", part)

    visit(model, "", None)
    return part_of


def _part(module: nn.Module, *, head: nn.Module | None, around: Part | None) -> Part | None:
    from torch import nn

    kind = type(module).__name__
    if kind.endswith("Norm"):
        return "norms"
    if (own := getattr(module, "optimizer_part", None)) is not None:
        return cast("Part", own)
    if kind.endswith("Router"):
        return "router"
    if kind.endswith("Experts"):
        return "experts"
    if around is not None:
        return around
    if isinstance(module, nn.Embedding) or module is head:
        return "embeddings"
    if kind.endswith("Attention"):
        return "attention"
    # What is left of a sparse block is its shared expert and that one's gate; Granite's stands beside the block.
    if kind.endswith("SharedMLP") or any(type(child).__name__.endswith("Router") for child in module.children()):
        return "shared"
    return "ffn" if kind.endswith("MLP") else None


def groups(model: PreTrainedModel, params: Pretrain) -> list[dict[str, Any]]:
    """The optimizer groups of what some phase trains: one for each part and each side of weight decay.

    No weight decay on norms, biases, routers and the token embedding: a router's logits have no scale to spare, and
    the embedding of a token that the corpus lacks would only shrink.

    Returns:
        Groups for torch's AdamW, with `part`, `active` (False while a phase leaves the part out) and a `name` of
        their own, which DeepSpeed needs to take the experts apart under expert parallelism.

    Raises:
        TrainingError: a phase, or an entry of `learning_rates`, has nothing to train in this model.
    """
    trained = _trained(params)
    by_name = dict(model.named_parameters())
    part_of = parts(model)
    for _, what in params.phases:
        if not set(TRAINED[what]) & set(part_of.values()):
            raise TrainingError(
                f"pretrain.train: `{what}` trains nothing, since {type(model).__name__} has no routers; set it to all"
            )
    for part in params.learning_rates:
        if part not in trained or part not in part_of.values():
            raise TrainingError(
                f"pretrain.learning_rates.{part}: {type(model).__name__} has no such part that pretrain.train trains; "
                f"take it out (here: {', '.join(sorted(trained & set(part_of.values())))})"
            )
    tokens = model.get_input_embeddings().weight
    members: dict[tuple[Part, bool], list[torch.Tensor]] = {}
    for name, part in part_of.items():
        if part in trained and not _stays(model, name):
            parameter = by_name[name]
            decayed = parameter.ndim > 1 and part != "router" and parameter is not tokens
            members.setdefault((part, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": part if decayed else f"{part}, not decayed",
            "part": part,
            "active": True,
            "lr": params.learning_rates.get(part, params.learning_rate),
            "weight_decay": params.weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in members.items()
    ]


def freeze(model: PreTrainedModel, params: Pretrain) -> None:
    """Let only what some phase trains require gradients. Call it before the engine is built."""
    require(model, _trained(params))


def _stays(model: PreTrainedModel, name: str) -> bool:
    """True for the gate before an elastic model's shared experts: llama.cpp runs one that is zero, as it begins."""
    return bool(architectures.elastic(model.config)) and name.endswith("shared_expert_gate.weight")


def _trained(params: Pretrain) -> set[Part]:
    return {part for _, what in params.phases for part in TRAINED[what]}


def require(model: PreTrainedModel, trained: Collection[Part]) -> None:
    """Let the parts in `trained` alone require gradients."""
    by_name = dict(model.named_parameters())
    for name, part in parts(model).items():
        by_name[name].requires_grad_(part in trained and not _stays(model, name))

"""What is trained: the parts of a model, their optimizer groups and rates, and phases that train some parts alone.

A part is decided by the module that a parameter stands in (its class, and what stands around it), not by its name, so
that it is the same for every class of tasks/moe and for the modules that DeepSpeed's AutoEP puts in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

from tasks.pretrain import schedule
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain
from tasks.settings.pretrain import Part, What

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
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
    and the head.

    Raises:
        TrainingError: a parameter stands in no module that is known here.
    """
    head = model.get_output_embeddings()
    found: dict[str, Part] = {}
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
            found[prefix + name] = part
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.", part)

    visit(model, "", None)
    return found


def _part(module: nn.Module, *, head: nn.Module | None, around: Part | None) -> Part | None:
    from torch import nn

    kind = type(module).__name__
    if kind.endswith("Norm"):
        return "norms"
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
    found: dict[tuple[Part, bool], list[torch.Tensor]] = {}
    for name, part in part_of.items():
        if part in trained:
            parameter = by_name[name]
            decayed = parameter.ndim > 1 and part != "router" and parameter is not tokens
            found.setdefault((part, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": part if decayed else f"{part}, not decayed",
            "part": part,
            "active": True,
            "lr": params.learning_rates.get(part, params.learning_rate),
            "weight_decay": params.weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in found.items()
    ]


def freeze(model: PreTrainedModel, params: Pretrain) -> None:
    """Let only what some phase trains require gradients. To be called before the engine is built."""
    _require(model, _trained(params))


def activate(engine_or_model: DeepSpeedEngine | PreTrainedModel, what: What) -> None:
    """Train the parts of `what` alone from the next forward pass on; an engine's optimizer leaves the others out.

    `what` must be one of the phases that the engine was built for.
    """
    given: Any = engine_or_model
    model = getattr(given, "module", given)
    _require(model, TRAINED[what])
    if model is not given:
        for group in given.optimizer.param_groups:
            group["active"] = group["part"] in TRAINED[what]


@contextmanager
def all_phases(engine: DeepSpeedEngine) -> Iterator[None]:
    """Let what any phase trains require gradients within the block, in which DeepSpeed saves or loads.

    Else it keeps what the phase leaves out apart, where loading in another phase doesn't find it, and with ZeRO-3 and
    expert parallelism it refuses to save experts that a phase leaves out.
    """
    model: Any = engine.module
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _require(model, {group["part"] for group in engine.optimizer.param_groups})
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def set_rates(engine: DeepSpeedEngine, *, step: int, params: Pretrain) -> dict[Part, float]:
    """Set the learning rates of optimizer step `step` (from 1), and what it trains. To be called before its forward.

    Returns:
        The rate of each part that the optimizer has; 0 where the phase leaves the part out.
    """
    what = next(what for last, what in params.phases if step <= last)
    if len(params.phases) > 1:
        activate(engine, what)
    share = schedule.share(step, params)
    rates: dict[Part, float] = {}
    for group in engine.optimizer.param_groups:
        part: Part = group["part"]
        peak = params.learning_rates.get(part, params.learning_rate)
        rates[part] = group["lr"] = peak * share if part in TRAINED[what] else 0.0
    return rates


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Start AdamW's moments, and let its step pass over groups that are not active: neither weights nor moments move.

    A rate of 0 would still move the moments. Every ZeRO stage steps its own flat tensors through this optimizer, so
    here is the one place to hold all of them back. The moments are there from the start because DeepSpeed links them
    to its parameters once, after the first step of the first group, and misses those that come later.
    """
    held: list[tuple[dict[str, Any], list[torch.Tensor]]] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if not group["active"]:
                held.append((group, group["params"]))
                group["params"] = []
                _start(optimizer, held[-1][1])  # stage 3 shows its tensors in the step alone

    def after(*_: Any) -> None:
        while held:
            group, parameters = held.pop()
            group["params"] = parameters

    for group in optimizer.param_groups:
        _start(optimizer, group["params"])
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _start(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
    """Give AdamW's state before its first step to what has none."""
    import torch

    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def _trained(params: Pretrain) -> set[Part]:
    return {part for _, what in params.phases for part in TRAINED[what]}


def _require(model: PreTrainedModel, trained: Sequence[Part] | set[Part]) -> None:
    by_name = dict(model.named_parameters())
    for name, part in parts(model).items():
        by_name[name].requires_grad_(part in trained)

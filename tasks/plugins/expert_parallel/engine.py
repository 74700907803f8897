"""Experts spread over processes by DeepSpeed's AutoEP, computed by moe_kernels, and gathered back for export.

With `expert_parallel: N`, DeepSpeed replaces each sparse block by an `AutoEPMoELayer` that holds E / N experts of this
process, and sends tokens to the process of their expert. What such an engine can't do is refused before it is built.

Shapes: T tokens of a forward pass, K experts per token, E experts, F width of one, D hidden.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.moe import counts, families, routing
from tasks.pretrain.engine import masters, universal
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch import nn


TESTED = ("transformers>=5.22,<5.25", "deepspeed>=0.19.8,<0.20")
"""What AutoEP is tested with, as pyproject.toml states it: it reaches into internals of transformers."""


def configuration(params: Pretrain, *, model_type: str) -> dict[str, Any]:
    """What DeepSpeed's configuration gets: `expert_parallel`, or nothing if every process has all experts.

    Raises:
        TrainingError: AutoEP can't train this model, or not in this way.
    """
    if params.expert_parallel == 1:
        return {}
    if model_type not in architectures.SPARSE:
        raise _refusal(params, f"model_type = {model_type!r} is none of {', '.join(architectures.SPARSE)}")
    if params.noise:
        raise _refusal(params, "noise: true needs a router of ours, and DeepSpeed puts its own in its place")
    if all(what == "router" for _, what in params.phases):
        raise _refusal(
            params, "train: router leaves the experts as they are, and DeepSpeed wants to train those it spreads"
        )
    block = {"enabled": True, "autoep_size": params.expert_parallel, **architectures.SPARSE[model_type].autoep}
    return {"expert_parallel": block}


def check(model: nn.Module, params: Pretrain) -> None:
    """Look at the stock model before DeepSpeed takes its sparse blocks apart.

    Raises:
        TrainingError: the experts can't be shared out evenly, or DeepSpeed's router would compute something else.
    """
    if params.expert_parallel == 1:
        return
    config: Any = model.config
    experts = counts.experts(config)["experts"]
    if experts % params.expert_parallel:
        raise _refusal(params, f"it doesn't divide the model's {experts} experts a layer")
    if values := architectures.elastic(config):
        raise _refusal(params, f"the model serves top_k {values}, and DeepSpeed's router has one; set it to 1")
    if jitter := getattr(config, "router_jitter_noise", 0):
        raise _refusal(
            params, f"config.json: router_jitter_noise = {jitter}, which DeepSpeed's router lacks; set it to 0"
        )
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Router"):
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            if set(tensors) - {"selection_bias"} != {"weight"}:
                raise _refusal(params, f"{name} is not linear as DeepSpeed's router is; it has {', '.join(tensors)}")


@contextlib.contextmanager
def conversion(params: Pretrain) -> Iterator[None]:
    """Around `deepspeed.initialize`, where AutoEP replaces the sparse blocks of a transformers model.

    Raises:
        TrainingError: AutoEP can't handle the installed transformers. Both versions are named.
    """
    try:
        with keyed_by_class_name():
            yield
    except (AttributeError, KeyError, TypeError) as error:
        deepspeed, transformers = map(importlib.metadata.version, ("deepspeed", "transformers"))
        raise _refusal(
            params,
            f"AutoEP of DeepSpeed {deepspeed} fails with transformers {transformers} ({type(error).__name__}: "
            f"{error}); install {' and '.join(TESTED)}, which are tested together",
        ) from error


@contextlib.contextmanager
def keyed_by_class_name() -> Iterator[None]:
    """Accept class names as keys of transformers' registry of output recorders while the block runs.

    AutoEP (deepspeed/module_inject/auto_ep_presets/base.py, 0.19.8) points the recorder of router logits to its own
    router, in `transformers.utils.output_capturing._CAN_RECORD_REGISTRY`, by `registry.get(str(cls), default)` and
    `registry[str(cls)] = entry`. Since transformers 5.23 that registry takes the model and names its class itself:
    `get` with two arguments is a TypeError, and an entry written back is filed under `<class 'str'>`.
    """
    from transformers.utils import output_capturing

    registry: Any = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", {}))
    if registry is dict or not issubclass(registry, dict):  # before 5.23, or one that AutoEP leaves alone
        yield
        return
    by_model = {name: getattr(registry, name) for name in ("get", "__setitem__")}

    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else by_model["get"](self, key, *default)

    def set_item(self: Any, key: Any, value: Any) -> None:
        (dict.__setitem__ if isinstance(key, str) else by_model["__setitem__"])(self, key, value)

    registry.get, registry.__setitem__ = get, set_item
    try:
        yield
    finally:
        for name, method in by_model.items():
            setattr(registry, name, method)


def _refusal(params: Pretrain, reason: str) -> TrainingError:
    return TrainingError(
        f"pretrain.expert_parallel = {params.expert_parallel}: {reason}. With expert_parallel: 1, every process has "
        "all experts; zero_stage: 3 then keeps a share of each on every process"
    )


def prepares(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed configuration spreads experts."""
    return "expert_parallel" in config


def prepare(engine: DeepSpeedEngine, *, biases: list[list[float]]) -> int:
    """Let moe_kernels compute the experts, and tasks/moe/routing read the routers.

    Args:
        biases: the stock routers' selection biases (gate.biases), with which DeepSpeed's go on; [] if there are none.

    Returns:
        How many layers' experts are computed by moe_kernels: all.
    """
    from moe_kernels.autoep import use_in_deepspeed

    routing.readers["TokenChoiceTopKRouter"] = _read
    if biases:
        for router, bias in zip(routing.routers(engine), biases, strict=True):
            _add_bias(router, bias)
    return use_in_deepspeed(engine.module)


def _add_bias(router: nn.Module, bias: list[float]) -> None:
    """Let a router of AutoEP choose as a TrainingRouter with this selection bias does (moe/internals).

    AutoEP's own `expert_bias` is added to the probabilities, and not to the logits as ours.
    """
    import torch

    weight: Any = router.gate.weight  # type: ignore[union-attr]
    router.register_buffer("selection_bias", torch.tensor(bias, device=weight.device), persistent=False)
    router.forward = functools.partial(_biased, router)


def _biased(router: Any, x_TD: torch.Tensor, expert_bias: None = None) -> tuple[torch.Tensor, ...]:
    """(weights, choice, tokens per expert), as the router's class gives them."""
    from deepspeed.moe.ep_count import count_tokens_per_expert

    logits_TE = router.gate(x_TD).float()
    chosen_TK = (logits_TE + router.selection_bias).topk(router.top_k, dim=1).indices
    weights_TK = logits_TE.softmax(1).gather(1, chosen_TK)
    if router.route_norm:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return weights_TK, chosen_TK, count_tokens_per_expert(chosen_TK, router.num_experts)


def _read(router: nn.Module, give: Callable[[routing.Routed], None]) -> list[Any]:
    """The reader of AutoEP's routers, whose output is (weights, choice, tokens per expert); see routing.Reader."""
    gate: Any = router.gate
    logits: list[torch.Tensor] = []

    def hook(_router: nn.Module, _inputs: Any, output: Any) -> None:
        (clean_TE,), (weights_TK, chosen_TK, _) = logits, output
        logits.clear()
        bias_E: Any = getattr(router, "selection_bias", None)
        logits_TE = clean_TE if bias_E is None else clean_TE.float() + bias_E
        give(
            routing.Routed(
                clean_TE=clean_TE, logits_TE=logits_TE, std_TE=None, weights_TK=weights_TK, chosen_TK=chosen_TK
            )
        )

    return [
        gate.register_forward_hook(lambda _gate, _inputs, logits_TE: logits.append(logits_TE)),
        router.register_forward_hook(hook),
    ]


def full_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor] | None:
    """Every parameter whole, in fp32 and under its stock name, from the master weights: on rank 0, on the CPU.

    All ranks must call it; the others get None. Experts come as the stock class stores them, `gate_up_proj`
    [E, 2 F, D], the gate first, and `down_proj` [E, D, F]. A tied parameter comes under its first name.

    Raises:
        TrainingError: names or shapes are not those of the stock model.
    """
    import torch

    blocks = _blocks(engine)
    owner = {id(parameter): block for block in blocks.values() for parameter in block.experts.parameters()}
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = masters.full(parameter)
        if (block := owner.get(id(parameter))) is not None:
            whole = _gather(whole, block)
        if torch.distributed.get_rank() == 0:
            gathered[name] = whole.to("cpu", torch.float32, copy=True)
    if torch.distributed.get_rank() != 0:
        return None
    weights = stock(gathered, model_type=engine.module.config.model_type)
    try:
        families.account(
            {name: tuple(tensor.shape) for name, tensor in weights.items()}, families.expected(engine.module.config)
        )
    except ValueError as error:
        raise TrainingError(f"what expert_parallel gathered {error}; nothing was exported") from None
    return weights


def read(path: Path, *, params: Pretrain, model: Path) -> dict[str, torch.Tensor] | None:
    """The weights in a checkpoint's files, as `full_weights` gave them; None if its experts are not spread.

    Args: those of masters.read.
    """
    import torch
    from transformers import AutoConfig

    if params.expert_parallel == 1:
        return None
    converted = path.with_name("universal")
    universal.convert(path, converted)
    parts = {}
    for file in (converted / "zero").glob("*/fp32.pt"):
        saved = torch.load(file, weights_only=True)
        parts[file.parent.name] = saved["param"] if isinstance(saved, dict) else saved
    shutil.rmtree(converted)
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    shapes = families.expected(config)
    whole = stock(parts, model_type=config.model_type)
    return {name: tensor.view(shapes.get(name, tensor.shape)) for name, tensor in whole.items()}  # ZeRO-3's are flat


def _blocks(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The AutoEP layers by the name of the block that each has replaced."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return {name: module for name, module in engine.module.named_modules() if isinstance(module, AutoEPMoELayer)}


def _gather(own: torch.Tensor, block: Any) -> torch.Tensor:
    """All experts of a block [E, ...], on the first process of its group; elsewhere, `own`."""
    import torch
    from deepspeed.checkpoint.autoep_affine import autoep_experts_for_rank

    first = torch.distributed.get_rank(block.ep_group) == 0
    parts = [torch.empty_like(own) for _ in range(block.ep_size)] if first else None
    torch.distributed.gather(own.contiguous(), parts, group=block.ep_group, group_dst=0)
    if parts is None:
        return own
    whole = own.new_empty(block.num_experts, *own.shape[1:])
    for rank, part in enumerate(parts):
        whole[list(autoep_experts_for_rank(block.expert_placement_descriptor, rank))] = part
    return whole


def stock(gathered: dict[str, torch.Tensor], *, model_type: str) -> dict[str, torch.Tensor]:
    """Whole tensors under AutoEP's names, as the stock class names and joins them."""
    import torch

    blocks = [name.removesuffix(".experts.w1") for name in gathered if name.endswith(".experts.w1")]
    router = architectures.SPARSE[model_type].router
    parts = {
        "router.gate.": f"{router}.",
        "shared_experts.": "shared_expert.",
        "shared_experts_gate.": "shared_expert_gate.",
    }
    weights = {}
    for name, tensor in gathered.items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            weights[name] = tensor
            continue
        inner = name.removeprefix(f"{block}.")
        if inner == "experts.w1":
            weights[f"{block}.experts.gate_up_proj"] = torch.cat([tensor, gathered[f"{block}.experts.w3"]], dim=1)
        elif inner == "experts.w2":
            weights[f"{block}.experts.down_proj"] = tensor
        elif inner != "experts.w3" and (router == "router" or not inner.startswith(f"{router}.")):  # a second name
            old = next((part for part in parts if inner.startswith(part)), "")
            weights[f"{block}.{parts.get(old, old)}{inner.removeprefix(old)}"] = tensor
    return weights

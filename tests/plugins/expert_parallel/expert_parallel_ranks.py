"""One of two processes that train a tiny Mixtral with its experts spread over both, in several ways.

Both leave what they saw in FOLDER; test_expert_parallel_training.py holds it against a stock model in one process.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tasks.moe import gate, routing
from tasks.moe.internals import layers
from tasks.pretrain.checkpoints import manager
from tasks.pretrain.engine import configuration, distributed, interface
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.loss.balance import Balancer
from tasks.settings import Pretrain
from tasks.settings.pretrain import Balance, Phase
from tests.pretrain import engines

WINDOWS, LENGTH = 4, 16
SAVED, LAST = 2, 4
CASES: dict[str, tuple[int, torch.dtype]] = {
    "zero-1": (1, torch.float32),
    "zero-2": (2, torch.float32),
    "zero-3": (3, torch.float32),
    "bias": (1, torch.float32),
    "bfloat16": (1, torch.bfloat16),
}


def settings(name: str, **fields: Any) -> Pretrain:
    """Four steps, of which under ZeRO 2 the first and under ZeRO 3 the first two train the routers alone."""
    alone = {"zero-2": 1, "zero-3": SAVED}.get(name)
    phases = [Phase(what="router", tokens=alone * WINDOWS * LENGTH), Phase(what="all")] if alone else "all"
    balance = Balance(loss="bias" if name == "bias" else "switch", coefficient=0.1, z_loss=0.01)
    common: dict[str, Any] = {
        "tokens": LAST * WINDOWS * LENGTH, "seq_len": LENGTH, "batch": WINDOWS, "processes": 2, "expert_parallel": 2,
        "zero_stage": CASES[name][0], "learning_rate": 0.5, "schedule": "constant", "clip": 0.5,
        "balance": balance, "train": phases,
    }  # fmt: skip
    return Pretrain(**common | fields)


def stock(name: str) -> Any:
    model = engines.mixtral(initializer_range=0.2)
    if name == "bias":
        gate.add_bias(model)
        gate.set_biases(model, [[0.3, -0.3, 0.1, -0.1], [0.0, 0.2, -0.2, 0.0]])
    torch.nn.Module.to(model, CASES[name][1])
    return model


def build(name: str, params: Pretrain, *, world_size: int, **block: Any) -> Engine:
    """An engine whose Adam has so large an eps that a gradient of the wrong size moves its weights wrongly."""
    model, dtype = stock(name), CASES[name][1]
    if params.zero_stage == 3:
        layers.recompute_activations(model)
    config = configuration.of(params, dtype=dtype, model_type="mixtral")
    config["optimizer"]["params"]["eps"] = 1.0
    if block:
        config["expert_parallel"] = block
    return interface.build(model, params, config=config)


def windows(step: int) -> torch.Tensor:
    """The batch of a step, [WINDOWS, LENGTH]."""
    return torch.randint(64, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(step))


def loss(model: Any, ids_BL: torch.Tensor, balancer: Balancer) -> torch.Tensor:
    """What training minimises on one micro-batch."""
    with routing.record(getattr(model, "module", model)) as routed:  # an engine's
        cross_entropy = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
    return cross_entropy + sum(balancer.losses(routed, real_T=None).values())


def train(built: Engine, params: Pretrain, steps: range) -> list[list[float]]:
    """Each step's loss, gradient norm and tokens per layer and expert; every rank has its share of the windows."""
    balancer, seen = Balancer(params, built.module), []
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in steps:
        built.set_rates(step=step, params=params)
        balancer.begin()
        total = torch.zeros(())
        for i in range(rank, WINDOWS, world_size):
            part = loss(built, windows(step)[i : i + 1], balancer)
            built.backward(part)
            total += part.detach().float()
            if i + world_size < WINDOWS:
                built.next_micro_batch()
        norm, load = built.finish_step(), torch.from_numpy(balancer.load_LE)
        balancer.end()
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(load)
        seen.append([total.item() / WINDOWS, norm, *load.flatten().tolist()])
    return seen


def spoil(built: Engine, params: Pretrain) -> None:
    """A step that is given up after its first micro-batch, then one with a NaN on one rank."""
    balancer = Balancer(params, built.module)
    built.set_rates(step=LAST, params=params)
    built.backward(loss(built, windows(0)[:1], balancer))
    built.discard_step()
    built.backward(loss(built, windows(0)[:1], balancer))
    built.next_micro_batch()
    wrong = float("nan") if torch.distributed.get_rank() == 1 else 1.0
    built.backward(wrong * loss(built, windows(0)[:1], balancer))
    assert not math.isfinite(built.finish_step())


def routed(model: Any) -> dict[str, torch.Tensor]:
    """What the routers do with the first window, layer by layer."""
    result: dict[str, torch.Tensor] = {}
    with torch.no_grad(), routing.record(model) as layers, routing.expert_load(model) as load_LE:
        model(input_ids=windows(0)[:1], use_cache=False)
    for i, layer in enumerate(layers):
        assert layer.std_TE is None
        zero_TE = torch.zeros_like(layer.clean_TE, dtype=torch.float32)
        weights_TE = zero_TE.scatter(1, layer.chosen_TK, layer.weights_TK.float())
        logits = {f"{i} clean": layer.clean_TE.clone(), f"{i} logits": layer.logits_TE.clone()}
        result |= logits | {f"{i} weights": weights_TE}
    return result | {"load": torch.from_numpy(load_LE)}


def main(rank: int, folder: Path) -> None:
    distributed.join(folder)
    for name in CASES:
        params, seen = settings(name), {}
        checkpoints = manager.CheckpointManager(folder / name, params=params, rank=rank, world_size=2)
        built = build(name, params, world_size=2)
        choice = routed(built.module)
        seen["before"] = train(built, params, range(1, SAVED + 1))
        checkpoints.save(built, state={"step": SAVED, "biases": gate.biases(built.module)})
        saved = built.full_weights()
        seen["after"] = train(built, params, range(SAVED + 1, LAST + 1))
        checkpoints.finish()
        last = built.full_weights()
        built.deepspeed.destroy()
        other = build(name, params, world_size=2)
        checkpoints = manager.CheckpointManager(folder / name, params=params, rank=rank, world_size=2)
        state = checkpoints.latest()
        assert state is not None
        other.set_rates(step=1, params=params)  # as in a rollback
        checkpoints.restore(other, state)
        gate.set_biases(other.module, state["biases"])
        spoil(other, params)
        seen["resumed"] = train(other, params, range(SAVED + 1, LAST + 1))
        resumed = other.full_weights()
        other.deepspeed.destroy()
        assert (rank == 0) == (saved is not None)
        if saved is not None and last is not None and resumed is not None:
            for kind, weights in (("choice", choice), ("saved", saved), ("last", last), ("resumed", resumed)):
                save_file(weights, folder / f"{name}-{kind}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(seen))
    distributed.leave()

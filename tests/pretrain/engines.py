"""A tiny engine and its training, for tests that need no stage around them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tasks.pretrain.engine import interface
from tasks.pretrain.engine.interface import Engine
from tasks.settings import Pretrain

BATCH, SEQ_LEN = 4, 16


def settings(**fields: Any) -> Pretrain:
    """Four windows a step, two at a time."""
    given = {"tokens": 4096, "seq_len": SEQ_LEN, "batch": BATCH, "micro_batch": 2, "learning_rate": 1e-2}
    return Pretrain(**given | {"save_every": 2} | fields)


def config(**fields: Any) -> MixtralConfig:
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return MixtralConfig(**sizes | fields)


def mixtral(dtype: torch.dtype = torch.float32, **fields: Any) -> MixtralForCausalLM:
    """The same weights in every call."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(config(**fields))
    torch.nn.Module.to(model, dtype)
    return model.train()


def build(params: Pretrain, *, world_size: int = 1, dtype: torch.dtype = torch.float32) -> Engine:
    return interface.build(mixtral(dtype), params)


def micro_loss(model: Any, step: int, micro: int) -> torch.Tensor:
    """The loss of one of a step's two micro-batches of two windows."""
    ids = torch.randint(64, (2, SEQ_LEN), generator=torch.Generator().manual_seed(2 * step + micro))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def train_step(built: Engine, step: int, *, factor: float = 1.0) -> tuple[list[float], float]:
    """Train on both micro-batches of a step; the gradient of the second is multiplied. Returns losses and norm."""
    losses = []
    for micro in range(2):
        losses.append(micro_loss(built, step, micro))
        built.backward(losses[-1] * (factor if micro == 1 else 1.0))
        if micro == 0:
            built.next_micro_batch()
    return [value.item() for value in losses], built.finish_step()


def train(
    built: Engine,
    steps: range,
    *,
    params: Pretrain | None = None,
    rank: int = 0,
    world_size: int = 1,
    norms: list[float] | None = None,
) -> list[float]:
    """Train on a batch of each step, the same at every world size; returns the losses of this rank's windows.

    The rates and phases are those of `params`; without, all is trained at the peak. The steps' norms go into `norms`.
    """
    losses = []
    for step in steps:
        if params:
            built.set_rates(step=step + 1, params=params)
        ids = torch.randint(64, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(step))[rank::world_size]
        for part in ids.split(built.deepspeed.train_micro_batch_size_per_gpu()):
            loss = built(input_ids=part, labels=part).loss
            built.backward(loss)
            losses.append(loss.item())
            if len(losses) % built.deepspeed.gradient_accumulation_steps():
                built.next_micro_batch()
        norm = built.finish_step()
        if norms is not None:
            norms.append(norm)
    return losses


def states(built: Engine) -> dict[str, torch.Tensor]:
    """Every master and Adam moment, whole, by name; all ranks must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    result = {}
    for name, parameter in built.module.named_parameters():
        if built.deepspeed.zero_optimization():
            wanted = parameter.requires_grad
            parameter.requires_grad_(True)  # stage 3 denies that others have a master
            result[name] = safe_get_full_fp32_param(parameter).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                result[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
            parameter.requires_grad_(wanted)
        else:
            result[name] = parameter.detach().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                result[f"{name} {moment}"] = built.deepspeed.optimizer.state[parameter][moment].clone()
    return result

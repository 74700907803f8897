"""Routings to balance, the settings and the model that a Balancer is made of, and one of two ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, nn

from tasks.moe import gate
from tasks.moe.routing import Routed
from tasks.pretrain.loss.balance import Balancer
from tasks.settings import Pretrain

EXPERTS, TOP_K, LAYERS = 6, 2, 2


def params(loss: str, **balance: Any) -> Pretrain:
    return Pretrain(
        tokens=4096, seq_len=16, batch=4, micro_batch=2, learning_rate=1e-2, balance={"loss": loss, **balance}
    )


class StubTopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, 4))


def stub(*, top_k: int = TOP_K) -> nn.Module:
    """Routers and a config, all that a Balancer looks at; without transformers, which takes seconds to import."""
    model: Any = nn.ModuleList([StubTopKRouter() for _ in range(LAYERS)])
    model.config = SimpleNamespace(
        model_type="mixtral", num_hidden_layers=LAYERS, num_local_experts=EXPERTS, num_experts_per_tok=top_k,
        intermediate_size=8,
    )  # fmt: skip
    gate.add_bias(model)
    return model


def balancer(loss: str, *, top_k: int = TOP_K, **balance: Any) -> Balancer:
    """One that has begun its first step; its coefficient is 1 unless given."""
    made = Balancer(params(loss, **{"coefficient": 1.0, **balance}), stub(top_k=top_k))
    made.begin()
    return made


def problem(seed: int, *, tokens: int, noise: bool = False, top_k: int = TOP_K) -> list[Routed]:
    """A lopsided routing of each layer, by logits that are leaves; with noise the clean logits and deviations are."""
    generator = torch.Generator().manual_seed(seed)
    routed = []
    for _ in range(LAYERS):
        clean_TE = torch.randn(tokens, EXPERTS, generator=generator) + torch.linspace(1, -1, EXPERTS)
        clean_TE.requires_grad_()
        logits_TE, std_TE = clean_TE, None
        if noise:
            std_TE = (torch.rand(tokens, EXPERTS, generator=generator) + 0.3).requires_grad_()
            logits_TE = clean_TE + std_TE * torch.randn(tokens, EXPERTS, generator=generator)
        values_TK, chosen_TK = logits_TE.topk(top_k, dim=1)
        parts = {"clean_TE": clean_TE, "logits_TE": logits_TE, "std_TE": std_TE, "weights_TK": values_TK.softmax(1)}
        routed.append(Routed(**parts, chosen_TK=chosen_TK))  # type: ignore[arg-type]
    return routed


def real(seed: int, tokens: int) -> torch.Tensor:
    """Which tokens are no padding: the first is none, and about a third are."""
    real_T = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) > 0.3
    real_T[0] = True
    return real_T


def cut(routed: Routed, rows: Any) -> Routed:
    """These tokens of a routing."""
    return Routed(**{name: None if tensor is None else tensor[rows] for name, tensor in vars(routed).items()})


def micro_batches() -> list[tuple[list[Routed], torch.Tensor]]:
    """Two micro-batches of 20 tokens; of the first, the second half has but 3 of 10 tokens."""
    return [
        (problem(7, tokens=20), torch.arange(20) < 13),
        (problem(8, tokens=20), torch.ones(20, dtype=torch.bool)),
    ]


def run_rank(rank: int, folder: str) -> None:
    """Balance half of each micro-batch's tokens, and write what both ranks have found."""
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    shapes, reduce = [], distributed.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        shapes.append(list(tensor.shape))
        reduce(tensor)

    distributed.all_reduce = counted
    mine = slice(10 * rank, 10 * rank + 10)
    made = balancer("global_batch")
    losses, gradients = [], []
    for routed, real_T in micro_batches():
        loss = made.losses([cut(each, mine) for each in routed], real_T=real_T[mine])["balance"]
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss, [each.logits_TE for each in routed])
    result = {"losses": torch.stack(losses) / 2, "gradients": torch.stack(gradients) / 2}
    result["reductions"] = torch.tensor(shapes)
    for name in ("losses", "gradients"):
        reduce(result[name])

    shapes.clear()
    mover = balancer("bias", coefficient=0.1)
    for routed, real_T in micro_batches():
        assert mover.losses([cut(each, mine) for each in routed], real_T=real_T[mine]) == {}
    mover.end()
    result["biases"] = torch.tensor(gate.biases(mover.model))
    result["reductions of the bias"] = torch.tensor(shapes)
    result["load"] = torch.from_numpy(mover.load_LE)
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()

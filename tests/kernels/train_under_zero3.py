"""Trains two experts layers for a few steps by plain torch, then in two processes under DeepSpeed's ZeRO-3.

Prints one JSON line: the losses of both, and by process, whether the storages that ZeRO-3 had gathered for each
forward were gone before its backward. (In one process alone ZeRO-3 gathers nothing: it lends its own partition.)

    DS_ACCELERATOR=cpu python -m torch.distributed.run --standalone --nproc_per_node 2 \
        tests/kernels/train_under_zero3.py
"""

import json

import deepspeed
import torch
import torch.distributed as dist
from moe_kernels import experts_layer
from moe_kernels.autograd import Path
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

STEPS, TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 4, 32, 6, 2, 24, 16
LEARNING_RATE = 1e-2
ZERO3 = {
    "stage": 3,
    # Every parameter, however small, is partitioned, and let go of after each use.
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


class Layer(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path: Path = path
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w13 = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.gathered: list[StorageWeakRef] = []

    def forward(self, x_TD: Tensor) -> Tensor:
        scores_TK, index_TK = self.router(x_TD).softmax(-1).topk(TOP_K)
        self.gathered = [StorageWeakRef(w.untyped_storage()) for w in (self.w13, self.w2)]
        return x_TD + experts_layer(x_TD, self.w13, self.w2, index_TK, scores_TK, path=self.path)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer("sorted"), Layer("dense"))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, TOKENS, HIDDEN, generator=generator)) for _ in range(STEPS)]  # type: ignore[misc]


def plain() -> list[float]:
    layers, losses = model(), []
    optimizer = torch.optim.AdamW(layers.parameters(), lr=LEARNING_RATE, weight_decay=0)
    for x, y in batches():
        loss = (layers(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def zero3() -> tuple[list[float], list[list[bool]]]:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling for nothing
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "zero_optimization": ZERO3,
    }
    layers = model()
    engine, *_ = deepspeed.initialize(model=layers, model_parameters=layers.parameters(), config=config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses, freed = [], []
    for x, y in batches():
        loss = (engine(x[rank::ranks]) - y[rank::ranks]).square().mean()
        freed += [storage.expired() for layer in layers for storage in layer.gathered]
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    by_rank: list[list[bool]] = [[]] * ranks
    dist.all_gather_object(by_rank, freed)
    return losses, by_rank


if __name__ == "__main__":
    expected = plain()
    losses, freed = zero3()
    if dist.get_rank() == 0:
        print(json.dumps({"plain": expected, "zero3": losses, "freed": freed}), flush=True)
    dist.destroy_process_group()

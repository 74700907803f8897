"""Under ZeRO-3 a weight exists only while its module computes; the tensors saved for backward must not hold it.

``layer_properties.py`` tests the same in one process, on every path.
"""

import json
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from children import join
from moe_kernels import experts_layer
from moe_kernels.autograd import Path as LayerPath
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.warm_processes import spawn

RANKS, STEPS, TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 2, 4, 32, 6, 2, 24, 16
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
    def __init__(self, path: LayerPath) -> None:
        super().__init__()
        self.path: LayerPath = path
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


def zero3(rank: int, folder: Path) -> None:
    """Write the losses, and by process whether the storages that ZeRO-3 had gathered for each forward were gone before
    its backward. (In one process alone ZeRO-3 gathers nothing: it lends its own partition.)"""
    join(rank, folder, ranks=RANKS)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 0, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "zero_optimization": ZERO3,
    }
    layers = model()
    engine, *_ = deepspeed.initialize(model=layers, model_parameters=layers.parameters(), config=config)
    losses, freed = [], []
    for x, y in batches():
        loss = (engine(x[rank::RANKS]) - y[rank::RANKS]).square().mean()
        freed += [storage.expired() for layer in layers for storage in layer.gathered]
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / RANKS)
    by_rank: list[list[bool]] = [[]] * RANKS
    dist.all_gather_object(by_rank, freed)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps({"losses": losses, "freed": by_rank}))
    dist.destroy_process_group()


@pytest.mark.e2e
def test_training_under_deepspeed_zero3_gives_the_losses_of_plain_torch_and_frees_the_weights(tmp_path: Path) -> None:
    spawn(zero3, (tmp_path,), nprocs=RANKS)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["losses"] == pytest.approx(plain(), rel=1e-5)
    assert [len(freed) for freed in result["freed"]] == [STEPS * 2 * 2] * RANKS
    assert all(map(all, result["freed"]))

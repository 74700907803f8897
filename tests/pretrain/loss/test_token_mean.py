"""Every predicted token of a step weighs the same: gradients against plain torch on the whole step, in float64.

Windows of 0 to 23 targets, of which those of whole micro-batches have none, by one process and by two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.pretrain import step_result
from tasks.pretrain.engine import distributed, interface
from tasks.pretrain.launch.process import Process
from tasks.pretrain.loss import objective
from tasks.pretrain.loss.distil import Distiller
from tasks.pretrain.loss.teacher import Teacher
from tasks.settings import Pretrain
from tests.warm_processes import spawn_ranks

WINDOWS, LENGTH, DOMAINS = 12, 24, ["a", "b", "c"]
TARGETS = [0, 0, 0, 0, 23, 1, 2, 23, 5, 0, 11, 3]
DISTILL = {
    "none": None,
    "logits": {"cross_entropy": 0.7, "logits": 0.4, "hidden": 0.3, "layers": "all", "temperature": 1.5},
    "hidden": {"cross_entropy": 0.5, "logits": 0.0, "hidden": 2.0},
}
CASES = list(itertools.product([0, 2], [1, 3], DISTILL))


def build(seed: int, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch(rank: int, world_size: int) -> Batch:
    """A rank's windows of the step."""
    ids = np.random.default_rng(0).integers(0, 50, (WINDOWS, LENGTH))
    labels = ids.copy()
    for row, targets in zip(labels, TARGETS, strict=True):
        row[targets + 1 :] = IGNORED
    mine = slice(rank, None, world_size)
    rows = len(ids[mine])
    return Batch(
        input_ids=ids[mine],
        labels=labels[mine],
        position_ids=None,
        cu_seqlens=np.arange(rows + 1, dtype=np.int32) * LENGTH,
        domains=[DOMAINS[i % 3] for i in range(WINDOWS)][mine],
        windows=list(range(WINDOWS))[mine],
        step_targets=sum(TARGETS),
    )


def step(zero: int, accumulation: int, distill: str, *, rank: int, world_size: int) -> dict[str, Any]:
    """One step's gradients by name, and what all ranks found."""
    params = Pretrain(
        tokens=WINDOWS * LENGTH, seq_len=LENGTH, batch=WINDOWS, micro_batch=WINDOWS // accumulation // world_size,
        processes=world_size, learning_rate=1.0, zero_stage=zero, clip=1e9, distill=DISTILL[distill],
    )  # fmt: skip
    model = build(0)
    built = interface.build(model, params)
    distiller = Distiller(params.distill, Teacher(build(1))) if params.distill else None
    compute = objective.Objective(params, built, balancer=None, distiller=distiller)
    mine, losses, cpu = batch(rank, world_size), [], torch.device("cpu")
    for start in range(0, len(mine.input_ids), params.micro_batch):
        losses.append(compute(mine, rows=slice(start, start + params.micro_batch), device=cpu))
        built.backward(losses[-1].total)
        if start + params.micro_batch < len(mine.input_ids):
            built.next_micro_batch()
    process = Process(rank=rank, world_size=world_size, device=cpu, hosts=[])
    seen = step_result.collect(
        mine, losses, names=compute.parts, domains=DOMAINS, load_LE=np.zeros((0, 0)), seconds=0.0, slots=WINDOWS,
        process=process,
    )  # fmt: skip
    from deepspeed.utils import safe_get_full_grad

    weights = dict(model.named_parameters())
    gradients = {name: (safe_get_full_grad(w) if zero else w.grad).clone() for name, w in weights.items()}
    built.discard_step()
    return {
        "gradients": gradients,
        "losses": {name: seen.mean(name) for name in seen.losses},
        "domains": [seen.of_domain(domain) for domain in DOMAINS],
        "predicted": seen.predicted,
    }


def plain(distill: str) -> dict[str, Any]:
    """The oracle: one forward pass over the whole step in float64, means over all its predicted tokens."""
    student, teacher = build(0, dtype=torch.float64), build(1, dtype=torch.float64)
    whole = batch(0, 1)
    ids, labels = torch.from_numpy(whole.input_ids), torch.from_numpy(whole.labels)[:, 1:]
    counted = labels != IGNORED
    own = student(input_ids=ids, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(input_ids=ids, output_hidden_states=True)
    nats = F.cross_entropy(own.logits[:, :-1][counted], labels[counted])
    losses, total = {"loss": nats.item()}, nats
    if settings := DISTILL[distill]:
        total = settings["cross_entropy"] * nats
        if settings["logits"]:
            t = settings["temperature"]
            q, p = (F.log_softmax(out.logits[:, :-1][counted] / t, -1) for out in (own, theirs))
            kl = settings["logits"] * t**2 * F.kl_div(q, p, log_target=True, reduction="sum") / counted.sum()
            losses["kl"], total = kl.item(), total + kl
        some = slice(1, None) if settings.get("layers") == "all" else slice(-1, None)
        pairs = zip(own.hidden_states[some], theirs.hidden_states[some], strict=True)
        errors = [((a - b).square().sum(-1) / b.square().sum(-1))[:, :-1][counted].mean() for a, b in pairs]
        hidden = settings["hidden"] * torch.stack(errors).mean()
        losses["hidden"], total = hidden.item(), total + hidden
    total.backward()
    domains = []
    for i in range(3):
        mine = counted[i::3]
        domains.append(F.cross_entropy(own.logits[i::3, :-1][mine], labels[i::3][mine]).item())
    return {
        "gradients": {name: weight.grad for name, weight in student.named_parameters()},
        "losses": losses,
        "domains": domains,
        "predicted": int(counted.sum()),
    }


def member(rank: int, folder: Path) -> None:
    """One of two processes: all cases, one after the other."""
    distributed.join(folder)
    torch.save([step(*case, rank=rank, world_size=2) for case in CASES], folder / f"rank-{rank}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, list[dict[str, Any]]]]:
    """(world size, case) -> what each rank has."""
    folder = tmp_path_factory.mktemp("pair")
    spawn_ranks(member, (folder,))
    pair = [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
    made: dict[Any, list[dict[str, Any]]] = {(2, *case): [rank[i] for rank in pair] for i, case in enumerate(CASES)}
    distributed.join(folder)
    made |= {(1, *case): [step(*case, rank=0, world_size=1)] for case in CASES}
    yield made
    distributed.leave()


@pytest.mark.parametrize("distill", DISTILL)
def test_a_step_is_the_mean_over_its_tokens_however_its_windows_are_shared_out(results: Any, distill: str) -> None:
    wanted = plain(distill)
    assert wanted["predicted"] == sum(TARGETS)
    for got in itertools.chain(*(ranks for case, ranks in results.items() if case[-1] == distill)):
        assert got["predicted"] == wanted["predicted"]
        assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert got["domains"] == pytest.approx(wanted["domains"], rel=1e-5)
        assert got["gradients"].keys() == wanted["gradients"].keys()
        for name, gradient in wanted["gradients"].items():
            torch.testing.assert_close(got["gradients"][name].double(), gradient, rtol=1e-4, atol=1e-6, msg=name)

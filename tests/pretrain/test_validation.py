from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from tasks.corpus.sampling import windows
from tasks.plugins.dynamic.hooks import Reweighter
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.validation import Validation
from tasks.settings import Pretrain
from tests.corpus.handmade import corpus, documents

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))


def validation() -> Validation:
    rng = np.random.default_rng(0)
    return Validation(windows={"a": rng.integers(0, 64, (3, 12)), "b": rng.integers(0, 64, (2, 12))}, references=None)


def on_every_rank(
    chosen: Validation, of: PreTrainedModel, *, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, float]], list[int]]:
    """What `evaluate` gives on each rank, and how many passes each made; the sum over ranks is made by hand."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: given.append(tensor.clone()))
    passes = [0] * world_size
    for rank in range(world_size):
        handle = of.base_model.register_forward_pre_hook(lambda *_, r=rank: passes.__setitem__(r, passes[r] + 1))
        chosen.evaluate(of, batch=2, rank=rank, world_size=world_size)
        handle.remove()
    total = torch.stack(given).sum(0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(total))
    return [chosen.evaluate(of, batch=2, rank=rank, world_size=world_size) for rank in range(world_size)], passes


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_loss_is_the_plain_next_token_loss_at_every_world_size_and_each_rank_makes_as_many_passes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, of = validation(), model(kind).train()
    expected = {}
    for domain, ids_BL in chosen.windows.items():
        with torch.no_grad():
            logits = of(input_ids=torch.from_numpy(ids_BL)).logits[:, :-1].double()
        picked = torch.log_softmax(logits, -1).gather(2, torch.from_numpy(ids_BL)[:, 1:, None])
        expected[domain] = -picked.mean().item()
    assert chosen.evaluate(of, batch=2, rank=0, world_size=1) == pytest.approx(expected, rel=1e-5)
    assert of.training
    for world_size in (2, 3, 7):  # 5 windows: shares of one size, of two, and ranks without any
        result, passes = on_every_rank(chosen, of, world_size=world_size, monkeypatch=monkeypatch)
        assert result[0] == pytest.approx(expected, rel=1e-5)
        assert all(losses == result[0] for losses in result)
        assert len(set(passes)) == 1


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """One over a corpus of two domains, with 40 and 24 validation tokens."""
    splits = {"a": [documents([40], seed=1)], "b": [documents([24], seed=2)]}
    folder = tmp_path / "corpus"
    folder.mkdir()
    corpus(folder, splits, validation=splits)
    paths = dict.fromkeys(("model", "parent", "workspace"), tmp_path)
    params = Pretrain(tokens=64, seq_len=8, batch=1, learning_rate=1e-3, eval_windows=2)
    return Job(pipeline="p", params=params, corpus=folder, mixture=tmp_path / "mixture.json", **paths)


def dynamic(job: Job, references: Any, **fields: Any) -> Job:
    given = {**job.params.model_dump(), "dynamic": {"references": references}, **fields}
    return Job(**{**vars(job), "params": Pretrain(**given)})


EVIDENCE = {"window_losses": {"a": [1.0, 2.0, 4.0, 8.0], "b": [1.0, 3.0, 5.0]}, "seq_len": 8, "windows": 4}


def test_the_parents_losses_are_those_on_the_very_windows_that_are_evaluated(job: Job) -> None:
    result = Validation.load(dynamic(job, "parent"), EVIDENCE)
    measured = windows.validation(job.corpus, seq_len=8, count=4)
    assert result.references == {"a": (1.0 + 4.0) / 2, "b": (1.0 + 3.0) / 2}
    for domain, picked in {"a": [0, 2], "b": [0, 1]}.items():
        assert np.array_equal(result.windows[domain], measured[domain][picked])


@pytest.mark.parametrize("references", [None, {"a": 1.0, "b": 2.0}])
def test_without_the_parents_losses_windows_are_of_the_training_length_and_no_reference_is_made_up(
    job: Job, references: Any
) -> None:
    asked = job if references is None else dynamic(job, references)
    result = Validation.load(asked, {})
    assert result.references is None
    assert {domain: ids.shape for domain, ids in result.windows.items()} == {"a": (2, 8), "b": (2, 8)}


def test_parents_losses_that_are_missing_or_of_too_few_windows_are_named(job: Job) -> None:
    for evidence, fields, message in (
        ({}, {}, r"mixture.json has none; run the stage `mixture` with mixture.method"),
        (EVIDENCE, {"eval_windows": 5}, r"eval_windows = 5 is more than the 4 windows of mixture.windows"),
    ):
        asking = dynamic(job, "parent", **fields)
        asking.mixture.write_text(json.dumps({"evidence": evidence}))
        with pytest.raises(TrainingError, match=message):
            Reweighter.load(asking, validation=Validation.load(asking, evidence), start={"a": 0.5, "b": 0.5})

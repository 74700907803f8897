"""A unit is a training by the stage's own loop, whose losses are those of a plain forward pass."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks import scratch, settings
from tasks.corpus.sampling import windows
from tasks.plugins.proxy_runs import models, units
from tasks.pretrain.job import Diverged, Job
from tasks.pretrain.launch import launcher
from tasks.settings import Proxy

CORPUS = Path("data/corpora/tiny")
EVEN = {"prose": 0.5, "code": 0.5}
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def setup_of(folder: Path, *, also: tuple[str, ...] = (), **fields: Any) -> units.Setup:
    """The setup of a tiny proxy from scratch: 4 steps of 4 windows of 64 tokens."""
    proxy = Proxy.model_validate(
        {"model": "scratch", "shape": SHAPE, "tokens": 1000, "seq_len": 64, "batch": 4, "learning_rate": 1e-2,
         "windows": 3} | fields
    )  # fmt: skip
    parent = Path("data/models/tiny")
    checkpoint = models.make(proxy, parent=parent, student=parent, folder=folder)
    params = units.training(proxy, settings.load().pipeline("tiny").pretrain)
    return units.Setup(checkpoint=checkpoint, corpus=CORPUS, params=params, also=also)


def test_a_unit_returns_the_losses_of_a_plain_forward_pass_on_every_domain(proxy_folder: Path) -> None:
    setup = setup_of(proxy_folder, also=("words",))
    assert (setup.tokens, setup.params.steps, setup.params.warmup_steps) == (1024, 4, 0)
    losses = units.train(setup, weights=EVEN, seed=1, workspace=proxy_folder / "one")
    trained = AutoModelForCausalLM.from_pretrained(proxy_folder / "one/trained").eval()
    text = windows.validation(CORPUS, seq_len=64, count=3) | windows.unseen(CORPUS, seq_len=64, count=3)
    for domain, ids_BL in text.items():
        ids = torch.from_numpy(ids_BL)
        with torch.no_grad():
            plain = np.mean([trained(input_ids=row[None], labels=row[None]).loss.item() for row in ids])
        assert losses[domain] == pytest.approx(plain, rel=1e-4)
    assert losses.keys() == {"prose", "code", "words"}
    again = units.train(setup, weights=EVEN, seed=1, workspace=proxy_folder / "two")
    other = units.train(setup, weights={"prose": 1.0, "code": 0.0}, seed=1, workspace=proxy_folder / "three")
    assert (again == losses, other["prose"] < losses["prose"]) == (True, True)


def test_a_unit_leaves_no_tensor_behind(proxy_folder: Path) -> None:
    def held() -> int:
        """Elements of all tensors, of those too that only a collection would free."""
        return sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor))

    setup = setup_of(proxy_folder)
    before = held()
    units.train(setup, weights=EVEN, seed=1, workspace=proxy_folder / "one")
    assert held() <= before


def test_in_a_thread_beside_others_a_unit_has_a_process_of_its_own(
    proxy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def launched(job: Job) -> None:
        started.append(job.workspace)
        scratch.write_json(job.workspace / "pretrain.json", {"validation_after": {"prose": 1.0, "code": 2.0}})

    monkeypatch.setattr(launcher, "run", launched)
    setup = setup_of(proxy_folder)
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(units.train, setup, weights=EVEN, seed=1, workspace=proxy_folder / "one").result()
    assert (made, started) == ({"prose": 1.0, "code": 2.0}, [proxy_folder / "one"])


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_rate_that_blows_up_says_that_the_unit_diverged(proxy_folder: Path) -> None:
    with pytest.raises(Diverged, match="not finite at step"):
        units.train(setup_of(proxy_folder, learning_rate=1e30), weights=EVEN, seed=1, workspace=proxy_folder / "one")


def test_the_key_of_a_setup_changes_with_model_settings_and_text(proxy_folder: Path) -> None:
    one = setup_of(proxy_folder)
    assert setup_of(proxy_folder).base() == one.base()
    assert setup_of(proxy_folder, learning_rate=1e-3).base() != one.base()
    assert setup_of(proxy_folder, seed=3).base() != one.base()
    assert one.domains().keys() == {"prose", "code"}
    assert setup_of(proxy_folder, also=("words",)).domains().keys() == {"prose", "code", "words"}


def test_a_student_is_trained_as_its_pipeline_says_and_the_others_as_dense_models() -> None:
    pretrain = settings.Pretrain.model_validate(
        {"tokens": 1 << 20, "seq_len": 64, "batch": 8, "learning_rate": 1e-3, "dynamic": {}, "processes": 4,
         "learning_rates": {"router": 1e-6, "attention": 1e-4}, "packing": "best_fit"}
    )  # fmt: skip
    params = {
        kind: units.training(Proxy(model=kind, tokens=40 * 2048, learning_rate=2e-4), pretrain)
        for kind in ("scratch", "parent", "student")
    }
    rates = {kind: each.learning_rates for kind, each in params.items()}
    assert rates == {"scratch": {}, "parent": {"attention": 1e-4}, "student": {"router": 1e-6, "attention": 1e-4}}
    assert [each.balance.loss for each in params.values()] == ["none", "none", "switch"]
    for each in params.values():
        assert (each.processes, each.dynamic, each.warmup_steps, each.steps, each.packing) == (
            1, None, 4, 40, "best_fit",
        )  # fmt: skip

"""Hugging Face checkpoints of kept steps: what they hold, and that the run they come from goes on undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from tasks import scratch
from tasks.moe import gate
from tasks.pretrain import export
from tasks.pretrain.checkpoints import store
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.engine import interface, masters
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

from .engines import config, mixtral, settings, train
from .projects import configure, wait_for, workers
from .warm_stages import start

pytestmark = pytest.mark.usefixtures("process_group")


def split(folder: Path, *, gated: bool) -> MixtralForCausalLM:
    """A split model on the disk, bf16 in its files, and as it trains."""
    model = mixtral(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("as it was")
    if gated:
        gate.write(folder, {layer: gate.start(4, 16, seed=0, layer=layer) for layer in range(2)})
        gate.swap_in(model, gate.read(folder))
    return model


def trained(
    root: Path, params: Pretrain, dtype: torch.dtype, *, gated: bool
) -> tuple[Engine, dict[str, torch.Tensor]]:
    """An engine after three steps, with its checkpoint in root/checkpoints, and its masters."""
    model = split(root / "moe", gated=gated)
    torch.nn.Module.to(model, dtype)
    if params.noise:
        gate.add_noise(model)
    model.train()
    built = interface.build(model, params)
    train(built, range(3))
    checkpoints = CheckpointManager(root / "checkpoints", params=params, rank=0, world_size=1)
    checkpoints.save(built, state={"step": 3})
    checkpoints.finish()
    weights = built.full_weights()
    assert weights is not None
    return built, weights


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "gated", "fields"),
    [(torch.float32, False, {"train": "router", "noise": True}), (torch.bfloat16, True, {})],
    ids=["fp32, routers alone, noisy", "bf16, two-layer gates"],
)
def test_the_masters_of_a_checkpoint_are_those_of_its_engine(
    tmp_path: Path, stage: int, dtype: torch.dtype, gated: bool, fields: dict[str, Any]
) -> None:
    params = settings(zero_stage=stage, **fields)
    _, expected = trained(tmp_path, params, dtype, gated=gated)
    result = masters.read(tmp_path / "checkpoints/step-00000003", params=params, model=tmp_path / "moe")
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert result[name].dtype == torch.float32
        assert torch.equal(result[name], tensor), name
    finer = any(bool((tensor != tensor.bfloat16().float()).any()) for tensor in result.values())
    assert finer  # masters, not the rounded weights


def test_what_is_written_loads_in_the_split_models_dtype(tmp_path: Path) -> None:
    params = settings()
    _, weights = trained(tmp_path, params, torch.float32, gated=False)
    folder = tmp_path / "out"
    fit = export.write(folder, weights, model=tmp_path / "moe", biases=None, windows=lambda: np.zeros((0, 0)))
    assert fit == {}
    assert (folder / "chat_template.jinja").read_text() == "as it was"
    assert not (folder / gate.FILE).exists()
    expected = MixtralForCausalLM(config())
    missing, unknown = expected.load_state_dict(weights, strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])
    torch.nn.Module.to(expected, torch.bfloat16)
    ids = torch.arange(32).view(2, 16)
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values())
    assert loaded.dtype == torch.bfloat16
    loss = loaded(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(expected(input_ids=ids, labels=ids).loss.item(), rel=1e-6)


def test_a_weight_too_few_or_of_another_shape_is_named_and_nothing_is_written_over_it(tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in split(tmp_path / "moe", gated=False).named_parameters()}
    arguments: dict[str, Any] = {"model": tmp_path / "moe", "biases": None, "windows": lambda: np.zeros((0, 0))}
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(model.norm.weight\)"):
        export.write(tmp_path / "a", dict(weights), **arguments)
    weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"model.norm.weight is \[3\]"):
        export.write(tmp_path / "b", dict(weights), **arguments)


def test_a_checkpoint_in_hand_outlives_its_deletion_and_one_deleted_under_the_hand_is_replaced_by_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "checkpoints"
    for step in (2, 4):
        folder = source / store.tag(step)
        folder.mkdir(parents=True)
        content = f"of {step}".encode()
        (folder / "weights").write_bytes(content)
        files = {"weights": {"bytes": 4, "xxh3_128": xxhash.xxh3_128_hexdigest(content)}}
        scratch.write_sealed(folder / "state.json", {"step": step, "files": files})
    newer = source / "step-00000004"
    newer.rename(tmp_path / "later")
    link = os.link

    def deleted(old: str, new: str) -> None:  # the run goes on between two links
        monkeypatch.setattr(os, "link", link)
        shutil.rmtree(source / "step-00000002")
        (tmp_path / "later").rename(newer)
        link(old, new)

    monkeypatch.setattr(os, "link", deleted)
    state = export._hold(source, tmp_path / "held", step=None)
    assert state["step"] == 4
    with pytest.raises(TrainingError, match="no checkpoint of step 2; kept: 4"):
        export._hold(source, tmp_path / "other", step=2)
    os.unlink(source / "step-00000004/weights")
    (source / "step-00000004/weights").write_text("of 5")
    with pytest.raises(TrainingError, match="weights: its content has changed"):
        export._hold(source, tmp_path / "other", step=4)
    shutil.rmtree(source)
    assert (tmp_path / "held" / state["tag"] / "weights").read_text() == "of 4"


@pytest.mark.e2e
def test_a_step_is_exported_while_its_run_goes_on_and_what_is_not_there_is_told(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="has no training with a checkpoint"):
        export.run("tiny")
    moe = project / "runs/tiny/moe"
    experts, hidden = gate.router(AutoModelForCausalLM.from_pretrained(moe)).state_dict()["weight"].shape
    gate.write(moe, {layer: gate.start(experts, hidden, seed=0, layer=layer) for layer in range(2)})
    configure(project, keep_every=2)
    run = start("tasks.pretrain", "tiny", cwd=project)
    wait_for(lambda: list(project.glob(".scratch/pretrain-tiny/*/checkpoints/step-00000006")))
    stopped = workers(project)
    for worker in stopped:
        os.kill(worker, signal.SIGSTOP)  # the stage holds the lock, and must not end meanwhile
    try:
        monkeypatch.setattr(sys, "argv", ["export", "tiny", "--step", "2"])
        assert export.main() == 0
        fitted, printed = capsys.readouterr().out.splitlines()
        with pytest.raises(TrainingError, match="no checkpoint of step 3; kept: 2, 4"):
            export.run("tiny", step=3)
    finally:
        run.process.kill()
        for worker in stopped:
            os.kill(worker, signal.SIGCONT)  # to see that the stage is gone
    run.wait()
    wait_for(lambda: not workers(project))
    assert "linear routers fitted to the gates: agreement" in fitted
    folder = Path("runs/tiny/exported/step-00000002")
    assert printed == str(folder)
    assert gate.read(folder).keys() == {0, 1}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded[1].values())
    assert gate.router(loaded[0]).state_dict()["weight"].abs().max() > 0

    with pytest.raises(TrainingError, match="runs: the folder is not empty"):
        export.run("tiny", to=Path("runs"))
    newest, _ = export.run("tiny", to=Path("elsewhere"))  # of a run that is dead now
    assert scratch.digest(newest) != scratch.digest(folder)
    assert not list(Path(".scratch").glob("export-tiny/*/"))

"""What the stage leaves and refuses, through its command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import warm_processes

from .conftest import STEPS
from .projects import configure, timeless
from .warm_stages import stage

pytestmark = pytest.mark.e2e


def print_plain_losses(folder: Path, rows_of: dict[str, list[list[int]]]) -> None:
    """By torch and transformers alone, for a process that has not loaded this project's code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.chdir("/")
    sys.path[:] = [path for path in sys.path if not Path(path, "tasks").is_dir()]
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    losses = {}
    for domain, rows in rows_of.items():
        ids = torch.tensor(rows)
        with torch.no_grad():
            losses[domain] = model(input_ids=ids, labels=ids).loss.item()
    print(json.dumps({"dtype": str(model.dtype), "losses": losses, "code": "tasks" in sys.modules}))


def test_training_needs_no_compiler_and_lowers_the_validation_loss(finished: Path) -> None:
    metrics = json.loads((finished / "runs/tiny/pretrain.json").read_text())
    assert metrics["validation_mean_after"] < metrics["validation_mean_before"]
    curve = metrics["curve"]
    assert (curve["loss"][0], curve["loss"][-1]) == (
        metrics["validation_mean_before"],
        metrics["validation_mean_after"],
    )
    assert (curve["tokens"][0], curve["tokens"][-1]) == (0, metrics["tokens"])
    assert curve["seconds"] == sorted(curve["seconds"])
    assert not any(finished.glob("**/*.so"))


def test_the_trained_checkpoint_loads_without_this_code_and_has_the_logged_loss(finished: Path) -> None:
    from tasks.corpus.sampling import windows

    root = finished
    evidence = json.loads((root / "runs/tiny/mixture.json").read_text())["evidence"]
    last = [r for r in timeless(root / "runs/tiny/training/log.jsonl") if r["kind"] == "validation"][-1]
    validation = windows.validation(root / "data/corpora/tiny", seq_len=evidence["seq_len"], count=evidence["windows"])
    shown = {
        domain: ids[[0, 2]].tolist() for domain, ids in validation.items()
    }  # eval_windows: 2 of mixture.windows: 4
    done = warm_processes.run(print_plain_losses, root / "runs/tiny/trained", shown)
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout.splitlines()[-1])
    assert plain["dtype"] == "torch.float32"
    assert not plain["code"]
    assert plain["losses"] == pytest.approx(last["losses"], abs=1e-5)


def test_the_log_holds_every_step_and_evaluation_with_lm_and_balance_loss_apart(finished: Path) -> None:
    log = timeless(finished / "runs/tiny/training/log.jsonl")
    steps = [record for record in log if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in log if record["kind"] == "validation"] == list(range(0, STEPS + 1, 2))
    for record in steps:
        parts = record["domains"].values()
        assert sum(part["windows"] for part in parts) == 4
        mean = sum(part["loss"] * part["windows"] for part in parts) / 4
        assert record["loss"] == pytest.approx(mean, rel=1e-6)
        assert record["parts"]["balance"] >= 0.0099  # Switch's is 1 at perfect balance, the coefficient 0.01
        assert record["total"] == pytest.approx(record["loss"] + record["parts"]["balance"])
    rows = (finished / "runs/tiny/loss.csv").read_text().splitlines()
    assert rows[0].startswith("step,tokens,loss")
    assert len(rows) == STEPS + 1


def test_expert_load_counts_every_validation_token_k_times_in_every_layer(finished: Path) -> None:
    load = json.loads((finished / "runs/tiny/training/expert_load.json").read_text())
    for moment in ("before", "after"):
        load_LE = np.array(load[moment])
        assert load_LE.shape == (2, 12)
        assert (load_LE.sum(1) == 2 * 2 * 64 * 4).all()  # domains x windows x tokens x top_k


def test_the_workspace_is_emptied_and_the_deepspeed_configuration_is_kept(finished: Path) -> None:
    config = json.loads((finished / "runs/tiny/training/deepspeed.json").read_text())
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["stage"] == 1
    assert not any(finished.glob(".scratch/pretrain-tiny/*/checkpoints"))
    assert any((finished / "runs/tiny/training/tensorboard").iterdir())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(project: Path) -> None:
    configure(project, learning_rate=1e30, save_every=1)
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 1
    assert "not finite at step 2" in done.stderr
    assert "Kept: the checkpoint of step 1 under" in done.stderr
    assert "window" in done.stderr
    assert "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert any(project.glob(".scratch/pretrain-tiny/*/checkpoints/step-00000001"))


def test_zero_3_in_bfloat16_with_gradient_checkpointing_trains_like_the_first(project: Path, finished: Path) -> None:
    configure(project, tokens=4 * 256, zero_stage=3, precision="bfloat16", gradient_checkpointing=True, processes=2)
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 0, done.stderr
    losses = [r["mean"] for r in timeless(project / "runs/tiny/training/log.jsonl") if r["kind"] == "validation"]
    first = [r["mean"] for r in timeless(finished / "runs/tiny/training/log.jsonl") if r["kind"] == "validation"]
    assert losses[0] == pytest.approx(first[0], abs=0.05)
    assert losses[-1] < losses[0]
    config = json.loads((project / "runs/tiny/trained/config.json").read_text())
    assert config["dtype"] == "float32"  # as the weights are stored, whatever they were trained in


def test_a_run_killed_while_it_publishes_keeps_the_log_that_its_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import scratch
    from tasks.pretrain import outputs
    from tasks.pretrain.job import Job
    from tasks.settings import Pretrain

    monkeypatch.chdir(tmp_path)
    workspace = Path(".scratch/work")
    for name in ("trained", "training", "checkpoints"):
        (workspace / name).mkdir(parents=True)
    (workspace / "training/log.jsonl").write_text("{}")
    params = Pretrain(tokens=1, seq_len=64, batch=1, learning_rate=1)
    paths = dict.fromkeys(("corpus", "model", "parent", "mixture"), tmp_path)
    job = Job(pipeline="tiny", params=params, workspace=workspace, **paths)

    def killed(result: Path, target: Path) -> None:
        if result.name == "trained":
            raise KeyboardInterrupt
        publish(result, target)

    publish = scratch.publish
    monkeypatch.setattr(scratch, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        outputs.publish(job)
    assert Path("runs/tiny/training/log.jsonl").read_text() == "{}"
    assert (workspace / "training/log.jsonl").exists()
    assert (workspace / "checkpoints").exists()


def test_a_missing_input_names_the_stage_that_makes_it(tiny_project: Path) -> None:
    done = stage("tasks.pretrain", "tiny", cwd=tiny_project)
    assert done.returncode == 1
    assert "run the stage `model` first" in done.stderr

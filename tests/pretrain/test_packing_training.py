"""Runs on packed, masked documents: what they log, how they resume, and that every step can be told afterwards."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flows import cli
from tasks.corpus import shards
from tasks.pretrain.job import TrainingError
from tasks.tools import inspect_run as inspect

from .conftest import STEPS
from .projects import assert_same_run, checkpoints, configure, timeless
from .warm_stages import kill_when, stage

pytestmark = pytest.mark.e2e
BATCH, SEQ_LEN = 4, 256

RECORDER = """

def _recorded(self, _next=Loader.next):
    import json
    batch = _next(self)
    seen = {"step": self.sampler.step, "ids": batch.input_ids.tolist(), "labels": batch.labels.tolist()}
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps({**seen, "domains": batch.domains, "windows": batch.windows}) + "\\n")
    return batch


Loader.next = _recorded
"""


def recording(prepared: Path, folder: Path) -> Path:
    """A project that trains on packed documents and writes down each batch that the loop takes."""
    shutil.copytree(prepared, folder)
    tokens = {"tokens": STEPS * BATCH * SEQ_LEN, "eval_tokens": 2 * BATCH * SEQ_LEN}
    configure(folder, packing="best_fit", mask_documents=True, seq_len=SEQ_LEN, **tokens)
    with (folder / "tasks/corpus/sampling/loader.py").open("a") as file:
        file.write(RECORDER)
    return folder


def seen(project: Path) -> dict[int, dict[str, Any]]:
    """Step -> the batch that the loop took in it; of a step that was done again, the last."""
    lines = (project / "seen.jsonl").read_text().splitlines()
    return {batch["step"]: batch for batch in map(json.loads, lines)}


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after an uninterrupted run."""
    project = recording(prepared, tmp_path_factory.mktemp("packed") / "project")
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 0, done.stderr
    return project


def compare(result: dict[str, Any], batch: dict[str, Any], project: Path) -> None:
    """A step as it is told against the batch that was trained on, and its documents against the shards."""
    assert [slot["ids"] for slot in result["slots"]] == batch["ids"]
    assert [slot["domain"] for slot in result["slots"]] == batch["domains"]
    assert [slot["window"] for slot in result["slots"]] == batch["windows"]
    for slot in result["slots"]:
        for document in slot["documents"]:
            begin, end = document["tokens"]
            shard = shards.open_shard(project / "data/corpora/tiny" / document["shard"])
            row = {name: shard.column(name)[document["document"]].as_py() for name in shard.schema.names}
            assert slot["ids"][document["at"] : document["at"] + end - begin] == row["input_ids"][begin:end]
            assert (document["doc_id"], document["source"]) == (row["doc_id"].hex(), row["source"])
            assert document["row"] == row["row"]


def test_every_step_of_a_run_with_moving_weights_is_told_as_the_loop_saw_it(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    batches = seen(trained)
    run = Path("runs/tiny")
    told = {step: inspect.step(run, step, full=True) for step in range(1, STEPS + 1)}
    for step, result in told.items():
        compare(result, batches[step], trained)
    log = timeless(run / "training/log.jsonl")
    weights = {record["step"]: record["weights"] for record in log if record["kind"] == "validation"}
    for step, result in told.items():
        assert result["weights"] == pytest.approx(weights[(step - 1) // 2 * 2], abs=1e-9)  # of every second step
    assert told[1]["weights"] != told[STEPS]["weights"]
    assert max(len(slot["documents"]) for result in told.values() for slot in result["slots"]) > 1
    text = "".join(document["text"] for document in told[1]["slots"][0]["documents"])
    source = {"prose": "prose.jsonl.gz", "code": "code.jsonl"}[told[1]["slots"][0]["domain"]]
    assert {document["source"] for document in told[1]["slots"][0]["documents"]} == {source}
    assert len(text) > 64

    configure(trained, seq_len=32)  # the run's own record counts, not what the file says by now
    try:
        assert inspect.step(run / "trained", 5, full=True)["slots"] == told[5]["slots"]
    finally:
        configure(trained, seq_len=SEQ_LEN)
    printed = CliRunner().invoke(cli.app, ["inspect", "runs/tiny", "--step", "3"])
    assert json.loads(printed.stdout) == inspect.step(run, 3)
    assert "ids" not in json.loads(printed.stdout)["slots"][0]
    assert CliRunner().invoke(cli.app, ["inspect", "runs/tiny", "--step", "99"]).exit_code == 1
    assert CliRunner().invoke(cli.app, ["inspect", "runs/tiny/trained", "--full"]).exit_code == 1
    for step in (0, STEPS + 1):
        with pytest.raises(TrainingError, match=f"has steps 1 to {STEPS}; there is no step {step} to show"):
            inspect.step(run, step)


def whole_step(project: Path, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """By plain torch: each window's summed nats under the converted model, document by document, and its targets."""
    model = AutoModelForCausalLM.from_pretrained(project / "runs/tiny/moe", dtype=torch.float32).eval()
    nats, counts = [], []
    for ids, labels in zip(batch["ids"], batch["labels"], strict=True):
        starts = [i for i, label in enumerate(labels) if label < 0] + [len(ids)]
        pieces = [ids[a:b] for a, b in itertools.pairwise(starts) if b - a > 1]
        with torch.no_grad():
            losses = [model(input_ids=(x := torch.tensor([piece])), labels=x).loss.item() for piece in pieces]
        nats.append(sum(loss * (len(piece) - 1) for loss, piece in zip(losses, pieces, strict=True)))
        counts.append(sum(len(piece) - 1 for piece in pieces))
    return np.array(nats), np.array(counts)


def test_a_packed_run_counts_what_it_predicts_and_learns(trained: Path) -> None:
    log = timeless(trained / "runs/tiny/training/log.jsonl")
    steps = [record for record in log if record["kind"] == "step"]
    labels = {step: np.array(batch["labels"]) for step, batch in seen(trained).items()}
    assert [record["predicted"] for record in steps] == [(labels[r["step"]][:, 1:] >= 0).sum() for r in steps]
    assert all(record["tokens"] == record["step"] * BATCH * SEQ_LEN for record in steps)
    losses, counts = whole_step(trained, seen(trained)[1])  # of the converted model, which the first step starts from
    loss = steps[0]["loss"]
    assert loss == pytest.approx(losses.sum() / counts.sum(), rel=1e-3)
    for domain, result in steps[0]["domains"].items():
        mine = np.array(seen(trained)[1]["domains"]) == domain
        assert result["loss"] == pytest.approx(losses[mine].sum() / counts[mine].sum(), rel=2e-3)
    metrics = json.loads((trained / "runs/tiny/pretrain.json").read_text())
    assert metrics["predicted_tokens"] == sum(record["predicted"] for record in steps)
    assert metrics["predicted_tokens"] < STEPS * BATCH * (SEQ_LEN - 1)
    assert metrics["validation_mean_after"] < metrics["validation_mean_before"]


def test_a_packed_run_killed_and_resumed_ends_as_the_other_and_can_be_told_while_it_stands(
    trained: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = recording(prepared, tmp_path / "project")
    monkeypatch.chdir(project)
    run = Path("runs/tiny")
    with pytest.raises(TrainingError, match=r"runs/tiny: no run is there; give runs/PIPELINE"):
        inspect.step(run, 1)
    kill_when(lambda: any(path.name == "step-00000004" for path in checkpoints(project)), cwd=project)
    result = inspect.step(run, 4, full=True)
    compare(result, seen(project)[4], project)
    assert (result["steps"], result["run"].startswith(".scratch/pretrain-tiny/")) == (STEPS, True)
    with pytest.raises(TrainingError, match=rf"has steps 1 to {result['steps_logged']}; there is no step 99"):
        inspect.step(run, 99)

    last = stage("tasks.pretrain", "tiny", cwd=project)
    assert last.returncode == 0, last.stderr
    assert "going on from the checkpoint of step" in last.stdout
    assert_same_run(project, trained)
    assert seen(project) == seen(trained)

    manifest = project / "data/corpora/tiny/manifest.json"
    manifest.write_text(manifest.read_text().replace("PSF-2.0", "CC0-1.0"))
    with pytest.raises(ValueError, match=r"manifest.json: sha256 is \w+ now and was \w+ when step 3 was drawn"):
        inspect.step(run, 3)

"""The pruned baseline of a tiny pipeline through the stage's command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks import scratch
from tasks.pretrain.job import JOB, Job
from tasks.tools import batch_trace, inspect_run
from tests.control.conftest import baseline_of, kill_when, metrics, set_control, unfinished
from tests.pretrain.conftest import STEPS
from tests.pretrain.projects import timeless
from tests.pretrain.warm_stages import stage

pytestmark = pytest.mark.e2e

WIDTH, ACTIVE = 128, 64  # 4 of 12 experts and 4 shared ones, of 8 neurons


@pytest.fixture(scope="module")
def made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project with its pruned baseline."""
    said = "pruned baseline with 64 of 128 neurons: validation loss "
    return baseline_of(
        finished, tmp_path_factory, "control", said=said, prepare=lambda root: set_control(root, "pruned")
    )


def windows(run: Path, step: int) -> list[list[int]]:
    """The token ids of a step's batch, by the log of its run."""
    folder = run / "training"
    job = Job.read(folder / JOB)
    _, _, state = inspect_run._state(folder / "log.jsonl", step)
    assert state is not None
    return [slot.ids.tolist() for slot in batch_trace.batch(job.corpus, state, step=step, seq_len=job.params.seq_len)]


def test_the_child_is_a_plain_checkpoint_of_the_parents_class_that_training_made_better(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known, root = metrics(made), made / "runs/tiny/control"
    parent = json.loads((made / "data/models/tiny/config.json").read_text())
    for name in ("split", "model"):
        config = json.loads((root / name / "config.json").read_text())
        assert config | {"intermediate_size": WIDTH} == parent
        assert config["intermediate_size"] == ACTIVE
        model = AutoModelForCausalLM.from_pretrained(root / name)
        assert model.num_parameters() == known["parameters"]
        AutoTokenizer.from_pretrained(root / name)
    assert known["control"] == "pruned"
    assert (known["ffn_width"], known["parent_ffn_width"]) == (ACTIVE, WIDTH)
    assert known["identity_error"] <= 1e-5
    assert known["loss"]["trained"]["mean"] < known["loss"]["cut"]["mean"]
    assert known["loss"]["cut"]["mean"] > sum(known["references"].values()) / 2
    assert known["loss"]["cut"].keys() == {"prose", "code", "mean"}
    assert known["seconds"].keys() == {"cut", "training"}
    assert not any((made / ".scratch").glob("control-tiny/*/"))


def test_the_loss_after_the_cut_is_that_of_the_checkpoint_after_the_cut(made: Path) -> None:
    from tasks.corpus.sampling import windows
    from tasks.moe.streamed import Streamed

    evidence = json.loads((made / "runs/tiny/mixture.json").read_text())["evidence"]
    validation = windows.validation(made / "data/corpora/tiny", seq_len=evidence["seq_len"], count=evidence["windows"])
    for folder, moment in (("split", "cut"), ("model", "trained")):
        child = Streamed(made / "runs/tiny/control" / folder)
        for domain, ids in validation.items():
            loss = child.nll(ids[[0, 2]], batch=2).mean() / 63  # eval_windows: 2 of mixture.windows: 4
            assert loss == pytest.approx(metrics(made)["loss"][moment][domain], abs=1e-5)


def test_every_step_has_the_batch_of_the_sparse_run_whose_losses_moved_the_domain_weights(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    sparse, child = Path("runs/tiny"), Path("runs/tiny/control")
    logs = [[r for r in timeless(run / "training/log.jsonl") if r["kind"] == "validation"] for run in (sparse, child)]
    weights = [[record["weights"] for record in log] for log in logs]
    assert weights[0] == weights[1]
    assert len({json.dumps(each) for each in weights[0]}) > 2  # they moved
    assert [r["losses"] for r in logs[0]] != [r["losses"] for r in logs[1]]  # and not by the child's losses
    for step in range(1, STEPS + 1):
        assert windows(sparse, step) == windows(child, step), step


def test_what_concerns_routers_is_left_out_and_the_rest_of_the_settings_is_the_same(made: Path) -> None:
    ours, theirs = (
        json.loads((made / "runs/tiny" / run / JOB).read_text())["params"] for run in ("training", "control/training")
    )
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ == {"balance"}
    rates = [
        [(r["step"], r["lr"]) for r in timeless(made / "runs/tiny" / run / "log.jsonl") if r["kind"] == "step"]
        for run in ("training", "control/training")
    ]
    assert rates[0] == rates[1]
    assert len(rates[0]) == STEPS


def test_killed_in_the_cut_in_a_step_and_while_it_publishes_it_ends_with_the_same_bytes(
    project: Path, made: Path
) -> None:
    set_control(project, "pruned")
    kill_when(project, lambda: unfinished(project, "unfinished/*.safetensors") or unfinished(project, "split"))
    kill_when(project, lambda: unfinished(project, "checkpoints/step-00000006"))
    assert unfinished(project, "split")
    published = project / "runs/tiny/control.json"
    kill_when(project, lambda: unfinished(project, "control/training") or published.exists())
    assert stage("tasks.control", "tiny", cwd=project).returncode == 0
    assert scratch.digest(project / "runs/tiny/control") == scratch.digest(made / "runs/tiny/control")
    untimed = []
    for each in (project, made):
        known = metrics(each)
        assert known["curve"].pop("seconds")[-1] > 0
        untimed.append({key: value for key, value in known.items() if key not in ("seconds", "tokens_per_second")})
    assert untimed[0] == untimed[1]
    curve, losses = untimed[0]["curve"], untimed[0]["loss"]
    assert (curve["loss"][0], curve["loss"][-1]) == (losses["cut"]["mean"], losses["trained"]["mean"])


def test_a_baseline_of_the_same_inputs_is_kept_and_other_settings_make_a_new_one_or_none(
    project: Path, made: Path
) -> None:
    set_control(project, "pruned")
    run = project / "runs/tiny"
    shutil.copytree(made / "runs/tiny/control", run / "control")
    shutil.copy(made / "runs/tiny/control.json", run)
    weights = run / "control/model/model.safetensors"
    before = os.stat(weights).st_ino
    path, yaml = project / "pipelines.yaml", YAML()
    content = yaml.load(path)
    content["pipelines"]["tiny"]["evaluate"]["windows"] = 3  # which no child is made from
    yaml.dump(content, path)
    again = stage("tasks.control", "tiny", cwd=project)
    assert "runs/tiny/control: made from the same inputs already, kept" in again.stdout
    assert os.stat(weights).st_ino == before
    assert metrics(project) == metrics(made)

    log = run / "training/log.jsonl"
    kept = log.read_text()
    log.unlink()
    refused = stage("tasks.control", "tiny", cwd=project)
    assert refused.returncode == 1
    assert "the sparse model's losses decide the batches" in refused.stderr
    assert "run the stage `pretrain` first" in refused.stderr
    log.write_text(kept)

    set_control(project, "none")
    done = stage("tasks.control", "tiny", cwd=project)
    assert done.stdout == "tiny has no pruned baseline (control: none)\n"
    assert [path.name for path in (run / "control").iterdir()] == ["made_from.json"]
    assert metrics(project) == {"control": "none"}
    assert not any((project / ".scratch").glob("control-tiny/*/"))

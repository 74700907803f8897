"""A finished run that is made longer, published again, and branched, on the way a user goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.pretrain.projects import assert_same_run, checkpoints, configure
from tests.pretrain.warm_stages import kill_when, stage

pytestmark = pytest.mark.e2e


def steps(project: Path, folder: str) -> list[str]:
    return [path.name for path in checkpoints(project, folder=folder)]


def test_a_finished_run_is_made_longer_to_the_bytes_of_the_long_one_and_published_again_without_a_step(
    project: Path, finished: Path
) -> None:
    long = 12 * 256
    configure(
        project, tokens=8 * 256, save_every=3, keep_finished=True
    )  # at full rate up to step 4, the long one up to step 6
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 0, done.stderr
    assert steps(project, "finished-tiny") == ["step-00000004", "step-00000008"]

    configure(project, tokens=long)
    kill_when(lambda: "step-00000006" in steps(project, "pretrain-tiny"), cwd=project)
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 0, done.stderr
    assert_same_run(project, finished)

    once = project / "runs/tiny"
    shutil.rmtree(once / "trained")  # as DVC does
    configure(project, trackers=[], keep=5)
    done = stage("tasks.pretrain", "tiny", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "published again: no step is left to train" in done.stdout
    assert_same_run(project, finished)
    assert json.loads((once / "pretrain.json").read_text())["resumed_from"]["step"] == 12
    assert not (once / "training/tensorboard").exists()

    path = project / "pipelines.yaml"
    content = YAML().load(path)
    content["pipelines"]["other"] = content["pipelines"]["tiny"]
    YAML().dump(content, path)
    shutil.copytree(once / "moe", project / "runs/other/moe")
    shutil.copy(once / "mixture.json", project / "runs/other/mixture.json")
    taken = stage("tasks.pretrain", "other", "--branch", "tiny", "--step", "6", cwd=project)
    assert taken.stdout == "other begins from step 6 of tiny; run it: `dvc repro pretrain@other`\n"
    assert steps(project, "pretrain-other") == ["step-00000006"]
    assert stage("tasks.pretrain", "other", "--discard", cwd=project).returncode == 0
    (project / "runs/other/moe/config.json").write_text("{}")
    refused = stage("tasks.pretrain", "other", "--branch", "tiny", cwd=project)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "other cannot begin from tiny: the converted model of the two are not the same" in refused.stderr

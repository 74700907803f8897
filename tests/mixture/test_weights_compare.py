"""The comparison of domain weights: its figures, and a whole one on a tiny project."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.mixture import compare
from tests.pretrain.conftest import prepared
from tests.pretrain.warm_stages import stage, stages

__all__ = ["prepared"]


def run(heldout: float, unseen: float) -> dict[str, Any]:
    return {"heldout": heldout, "unseen": unseen, "tokens": 10}


def test_a_method_is_better_only_by_more_than_two_standard_errors_of_the_differences_by_seed() -> None:
    uniform = [run(3.0, 4.0), run(3.5, 4.0), run(4.0, 4.0)]
    better = [run(2.9, 4.1), run(3.4, 3.9), run(3.89, 4.0)]
    row = compare.row(better, {"uniform": uniform})
    difference = row["heldout"]["against"]["uniform"]
    assert difference["mean"] == pytest.approx(-0.31 / 3)
    assert difference["stderr"] == pytest.approx(0.01 / 3)  # of -0.1, -0.1, -0.11
    assert difference["outcome"] == "better than uniform"
    assert row["heldout"]["stderr"] > 0.2  # the seeds differ far more than the methods
    assert row["unseen"]["against"]["uniform"]["outcome"] == "no better, no worse than uniform"
    assert "target" not in row
    worse = compare.row(uniform, {"uniform": better})
    assert worse["heldout"]["against"]["uniform"]["outcome"] == "worse than uniform"
    alone = compare.row(uniform[:1], {"uniform": better[:1]})
    assert math.isnan(alone["heldout"]["stderr"])
    assert alone["heldout"]["against"]["uniform"]["outcome"] == "one seed says nothing"


@pytest.mark.e2e
def test_a_comparison_trains_each_run_once_at_equal_tokens_and_at_equal_cost(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    monkeypatch.chdir(project)
    shutil.rmtree("data/corpora/tiny")  # `prepared` has no test text
    stages(("tasks.corpus", "tiny"), cwd=project)
    settings = Path("pipelines.yaml")
    settings.write_text(settings.read_text().replace("tokens: 3072", "tokens: 512"))
    mixture = Path("runs/tiny/mixture.json")
    content = json.loads(mixture.read_text())
    content["evidence"]["cost"] = {"tokens": 900, "share_of_training": 2.0, "flops_share": 1.0}
    mixture.write_text(json.dumps(content))

    command = ("tasks.mixture.compare", "tiny", "--seeds", "3")
    first = stage(*command, cwd=project)
    assert first.returncode == 0, first.stderr
    assert "| heldout | " in first.stdout
    written = json.loads(Path("runs/tiny/compare.json").read_text())
    assert written["equal_tokens"]["tokens"] == written["equal_tokens"]["baseline_tokens"] == 512
    assert (written["equal_cost"]["tokens"], written["equal_cost"]["baseline_tokens"]) == (512, 1024)
    assert 0 < written["equal_cost"]["heldout"]["mean"] < 1.1 * math.log(512)
    runs = {path: path.stat().st_mtime_ns for path in Path("runs/tiny/compare").iterdir()}
    assert sorted(json.loads(path.read_text())["tokens"] for path in runs) == [512, 512, 512, 1024, 1024]

    assert stage(*command, cwd=project).stdout == first.stdout[first.stdout.index("tiny: reference_loss against") :]
    assert {path: path.stat().st_mtime_ns for path in Path("runs/tiny/compare").iterdir()} == runs
    assert json.loads(Path("runs/tiny/compare.json").read_text()) == written
    mixture.unlink()
    assert compare.main(["tiny"]) == 1
    assert "run the stage `mixture` first" in capsys.readouterr().err

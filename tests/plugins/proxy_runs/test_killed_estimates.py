"""Runs that estimate domain weights, killed at a checkpoint, beside runs in one piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.projects import timeless, wait_for, workers
from tests.pretrain.warm_stages import start

pytestmark = pytest.mark.e2e

TRAIN = """
import json
import sys
from pathlib import Path
from tasks import scratch, settings
from tasks.pretrain.job import Job
from tasks.pretrain.launch import launcher

work, parent = Path(sys.argv[1]), Path("data/models/tiny")
work.mkdir(exist_ok=True)
scratch.write_json(work / "mixture.json", {"weights": {"prose": 0.5, "code": 0.5}, "evidence": {}})
given = settings.load().pipeline("tiny").pretrain.model_dump()
params = settings.Pretrain(**given | {"dynamic": None, "tokens": 8 * 256, "balance": {"loss": "none"}})
folders = {"corpus": Path("data/corpora/tiny"), "model": parent, "parent": parent, "mixture": work / "mixture.json"}
launcher.run(Job(pipeline="tiny.estimate", params=params, workspace=work, options=json.loads(sys.argv[2]), **folders))
"""
# DoReMi is killed in tests/plugins/proxy_runs/test_online_stage.py
PLANS: dict[str, dict[str, Any]] = {
    "doge": {"target": {"code": 1.0}},
    "aioli": {"updates": 2, "sweeps": 1, "sweep_steps": 1},
}


@pytest.mark.parametrize("method", PLANS)
def test_a_killed_estimate_ends_with_the_same_bytes_and_the_same_course(project: Path, method: str) -> None:
    from tasks import scratch  # not above: a forked stage imports its project's own code

    (project / "estimate_job.py").write_text(TRAIN)
    plan = json.dumps({method: PLANS[method]})
    killed = start("estimate_job", "killed", plan, cwd=project)
    wait_for(lambda: [*project.glob("killed/checkpoints/step-*")])
    killed.process.kill()
    killed.wait()
    wait_for(lambda: not workers(project), seconds=20)
    again = start("estimate_job", "killed", plan, cwd=project).wait()
    assert again.returncode == 0, again.stderr
    assert "going on from the checkpoint" in again.stdout
    assert start("estimate_job", "whole", plan, cwd=project).wait().returncode == 0
    logs = [timeless(project / name / "training/log.jsonl") for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert scratch.digest(project / "killed/trained") == scratch.digest(project / "whole/trained")
    results = [json.loads((project / name / "pretrain.json").read_text())["estimate"] for name in ("killed", "whole")]
    assert results[0] == results[1]
    assert sum(results[0].values()) == pytest.approx(1)
    kind = "validation" if method == "aioli" else "step"
    course = [record["estimate"]["weights"] for record in logs[0] if record["kind"] == kind and "estimate" in record]
    assert len(course) == (6 if method == "aioli" else 8)
    assert course[-1] != {"prose": 0.5, "code": 0.5}

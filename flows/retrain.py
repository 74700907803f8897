"""Scheduled retraining: read the corpus sources again, train if anything changed, keep only a model that is not worse.

    python -m flows.retrain demo
    prefect deployment run retrain/demo --param publish=true

The last accepted model's figures stand in runs/PIPELINE/accepted.json, which is in git.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import dag, judgement, stages
from flows.upcycle import slug
from tasks import scratch, settings


@flow(name="retrain", persist_result=False)
def retrain(pipeline: str = "demo", publish: bool = False, force: bool = False, tolerance: float = 0.0) -> State[Any]:
    """Retrain a pipeline and accept or refuse the result.

    Args:
        pipeline: its name in pipelines.yaml.
        publish: commit dvc.lock, the metrics and accepted.json, and `dvc push` if there is a remote.
        force: run the stage pretrain and judge although nothing changed; a finished run is published again.
        tolerance: how much worse, in bits per byte averaged over domains, a new model may be.

    Returns:
        "Nothing to do" or "Accepted" (both completed), or "Refused" (failed; its files stay for inspection).

    Raises:
        SettingsError, BusyError, StageError: as the upcycle flow does.
    """
    config = settings.load().pipeline(pipeline)
    with scratch.workspace("run", pipeline):
        plan = dag.ancestors(dag.last_stage(pipeline))
        sources = [stage for stage in plan if stage.name == f"sources@{config.corpus}"]
        stages.run(sources, force={stage.name for stage in sources})
        stale = any(dag.changes([stage.name for stage in plan]).values())
        last = judgement.accepted(pipeline)
        if last and not stale and not force:
            return _nothing_to_do(pipeline, last)
        outcomes = stages.run(plan, force=dag.resolve(["pretrain"], stages=plan) if force else None)
        ran = ", ".join(outcome.name for outcome in outcomes if outcome.ran) or "nothing"
        new = judgement.figures(pipeline)
        verdict = judgement.refusal(new["trained"], last["trained"] if last else None, tolerance=tolerance)
        say(pipeline, verdict or "accepted", rows={"this model": new, "last accepted": last}, ran=ran)
        if verdict:
            return Failed(name="Refused", message=f"{pipeline}: {verdict}; runs/{pipeline}/ keeps the refused model")
        judgement.accept(pipeline, new)
        published = publish and _publish(pipeline, plan)
        return Completed(
            name="Accepted", message=f"{pipeline}: {new['trained']:.4f} bits per byte; {published or 'not published'}"
        )


def say(pipeline: str, verdict: str, *, rows: dict[str, dict[str, Any] | None], ran: str) -> None:
    """Put the verdict and the figures into the log and into an artifact."""
    get_run_logger().info("%s: %s; ran %s", pipeline, verdict, ran)
    lines = [f"**{pipeline}**: {verdict}.", "", "| bits per byte | trained | dense parent |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['trained']:.4f} | {row['dense']:.4f} |" for name, row in rows.items() if row]
    create_markdown_artifact(
        key=f"retrain-{slug(pipeline)}", markdown="\n".join([*lines, "", f"Stages that ran: {ran}."])
    )


def _nothing_to_do(pipeline: str, last: dict[str, Any]) -> State[Any]:
    now = judgement.figures(pipeline)
    say(pipeline, "nothing to do", rows={"this model": now, "last accepted": last}, ran="nothing")
    note = "" if now["trained"] == last["trained"] else f"; the model in runs/{pipeline}/ is not the accepted one"
    return Completed(
        name="Nothing to do", message=f"{pipeline}: the sources and everything after them are unchanged{note}"
    )


def _publish(pipeline: str, plan: list[dag.Stage]) -> str:
    """Commit what git holds of this pipeline, push what DVC holds. Returns what was done."""
    kept = [path for stage in plan for path in stage.in_git] + [judgement.record(pipeline), Path("dvc.lock")]
    paths = [str(path) for path in kept if path.exists()]
    _call("git", "add", "--", *paths)
    if subprocess.run(["git", "diff", "--cached", "--quiet", "--", *paths], check=False).returncode:
        _call("git", "commit", "--quiet", "--message", f"Accept the retrained {pipeline}", "--", *paths)
        done = f"committed {_call('git', 'rev-parse', '--short', 'HEAD').strip()}"
    else:
        done = "nothing to commit"
    dvc = [sys.executable, "-m", "dvc"]
    if not _call(*dvc, "remote", "list").strip():
        return f"{done}; no DVC remote to push to (`dvc remote add --default NAME URL`)"
    _call(*dvc, "push", "--quiet", *[stage.name for stage in plan])
    return f"{done}; pushed"


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=stages.environment())
    if done.returncode:
        raise dag.StageError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


if __name__ == "__main__":
    retrain(pipeline=sys.argv[1])

"""Scheduled retraining: read the corpus sources again, train if data or settings changed, ship what is not worse.

    python -m flows.retrain demo                # or with --code, to retrain because the code changed
    prefect deployment run retrain/demo --param publish=true

quality_gate.py has the rule, releases.py the folders: runs/PIPELINE/release changes on acceptance alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import dag, environment, preflight, quality_gate, releases, stages
from flows.dag import Stage, StageError
from flows.upcycle import slug
from tasks import scratch, settings


@flow(name="retrain", persist_result=False)
def retrain(
    pipeline: str = "demo", publish: bool = False, force: bool = False, tolerance: float = 0.0, code: bool = False
) -> State[Any]:
    """Retrain a pipeline, and ship the result or refuse it.

    Args:
        pipeline: its name in pipelines.yaml.
        publish: commit dvc.lock, the metrics and accepted.json, and `dvc push` if there is a remote. What an earlier
            run accepted and could not publish is published first.
        force: run the stage pretrain and evaluate although nothing changed; a finished run is published again.
        tolerance: how much worse, in bits per byte averaged over domains, a new model may be (quality_gate.py).
        code: retrain if only the code changed, too. Without it, the state says which commit made the present model.

    Returns:
        "Nothing to do" or "Accepted" (both completed), or "Refused" (failed; its files stay for inspection).

    Raises:
        SettingsError, BusyError, StageError: as the upcycle flow does; StageError also if publishing failed.
    """
    config = settings.load()
    corpus = config.pipeline(pipeline).corpus
    with scratch.workspace("run", pipeline):
        plan = dag.ancestors(dag.last_stage(pipeline))
        if problem := releases.settle(pipeline):
            get_run_logger().warning(problem)
        caught_up = _catch_up(pipeline, plan) if publish else ""
        preflight.require(config, pipeline)
        sources = [stage for stage in plan if stage.name == f"sources@{corpus}"]
        stages.run(sources, force={stage.name for stage in sources})
        reasons = dag.changes([stage.name for stage in plan])
        code_note = _code_note(pipeline, reasons)
        is_due = force or any(not dag.is_code(reason) for each in reasons.values() for reason in each)
        is_due = is_due or (code and bool(code_note))
        last = quality_gate.accepted(pipeline)
        if last and not is_due and releases.is_decided(pipeline):
            rows = {"this model": quality_gate.present(pipeline), "last accepted": last}
            say(pipeline, "nothing to do", rows=rows, ran="nothing")
            note = f"{pipeline}: the sources and everything after them are unchanged"
            if releases.present(pipeline) != last.get("release"):
                note += f"; runs/{pipeline}/model is not the accepted one"
            if code_note:
                note += f"; {code_note}: code=true retrains with the present code"
            return Completed(name="Nothing to do", message=f"{note}{caught_up}")
        forced = dag.resolve(["pretrain"], stages=plan) if force else None
        outcomes = stages.run(plan, force=forced) if is_due else []
        ran = ", ".join(outcome.name for outcome in outcomes if outcome.ran) or "nothing"
        new = quality_gate.present(pipeline)
        decision = quality_gate.decide(new, last, tolerance=tolerance)
        why = decision.why + (f"; {code_note}" if code_note else "")
        say(pipeline, why, rows={"this model": new, "last accepted": last}, ran=ran)
        if not decision.accepted:
            folder = releases.refuse(pipeline, new, decision.why)
            return Failed(name="Refused", message=f"{pipeline}: {why}; {folder}/ keeps it for inspection")
        folder = releases.accept(pipeline, {**new, "slipped": decision.slipped})
        done = _publish(pipeline, plan, f"{folder} is accepted and shipped here") if publish else "not published"
        return Completed(name="Accepted", message=f"{pipeline}: {why}; {folder}; {done}")


def _code_note(pipeline: str, reasons: dict[str, list[str]]) -> str:
    """What changed in the code since the present model was made, and by which commit that was; "" if nothing did."""
    changed = [
        f"{stage.partition('@')[0]} ({reason.removeprefix('code: ')})"
        for stage, each in reasons.items()
        for reason in each
        if dag.is_code(reason)
    ]
    commit = quality_gate.commit(pipeline) or "an unknown commit"
    return f"the code has changed since {commit} trained the model before: {', '.join(changed)}" if changed else ""


def say(pipeline: str, decision: str, *, rows: Mapping[str, dict[str, Any] | None], ran: str) -> None:
    """Put the decision and the figures into the log and into an artifact."""
    get_run_logger().info("%s: %s; ran %s", pipeline, decision, ran)
    lines = [f"**{pipeline}**: {decision}.", "", "| bits per byte | trained | dense parent |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['trained']:.4f} | {row['dense']:.4f} |" for name, row in rows.items() if row]
    create_markdown_artifact(
        key=f"retrain-{slug(pipeline)}", markdown="\n".join([*lines, "", f"Stages that ran: {ran}."])
    )


def _catch_up(pipeline: str, plan: list[Stage]) -> str:
    """Publish what was accepted and is not published, before anything of it is replaced. Returns what was done."""
    if not releases.is_unpublished(pipeline):
        return ""
    last = quality_gate.accepted(pipeline) or {}
    if releases.present(pipeline) != last["release"]:
        get_run_logger().warning(
            f"{pipeline}: release {last['release']} was never published, and runs/{pipeline}/ holds a later result; "
            f"its files are in runs/{pipeline}/release"
        )
        return ""
    done = _publish(pipeline, plan, f"release {last['release']} was accepted before, and nothing was trained now")
    return f"; release {last['release']}: {done}"


def _publish(pipeline: str, plan: list[Stage], state: str) -> str:
    """Commit what git holds of this pipeline, push what DVC holds. Returns what was done.

    Raises StageError with `state` if a command fails; the next run that publishes tries again, and trains nothing.
    """
    files = [path for stage in plan for path in stage.in_git] + [quality_gate.record(pipeline), Path("dvc.lock")]
    paths = [str(path) for path in files if path.exists()]
    try:
        _call("git", "add", "--", *paths)
        if subprocess.run(["git", "diff", "--cached", "--quiet", "--", *paths], check=False).returncode:
            _call("git", "commit", "--quiet", "--message", f"Accept the retrained {pipeline}", "--", *paths)
            done = f"committed {_call('git', 'rev-parse', '--short', 'HEAD').strip()}"
        else:
            done = "nothing to commit"
        dvc = [sys.executable, "-m", "dvc"]
        remote = bool(_call(*dvc, "remote", "list").strip())
        if remote:
            _call(*dvc, "push", "--quiet", "--with-deps", dag.last_stage(pipeline))
    except StageError as error:
        raise StageError(
            f"{pipeline}: {state}, but publishing failed: {error}; the next retrain with publish=true publishes it "
            "without training"
        ) from None
    releases.mark_published(pipeline)
    return f"{done}; pushed" if remote else f"{done}; no DVC remote to push to (`dvc remote add --default NAME URL`)"


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment.variables())
    if done.returncode:
        raise StageError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    parser.add_argument("--code", action="store_true", help="retrain if only the code changed, too")
    arguments = parser.parse_args()
    environment.connect()
    retrain(pipeline=arguments.pipeline, code=arguments.code)

"""From a dense checkpoint to a judged Mixture-of-Experts: the stages of dvc.yaml that lead to a pipeline's report.

moeforge run demo                                   # with a live display
python -m flows.upcycle demo                        # the same flow, with Prefect's log
prefect deployment run upcycle/demo                 # on a server, by a worker
"""

from __future__ import annotations

import platform
import sys

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows import dag, environment, preflight, stages
from flows.stages import Outcome
from tasks import scratch, settings


@flow(name="upcycle", persist_result=False)
def upcycle(pipeline: str = "demo", refresh: bool = False, force: list[str] | None = None) -> list[Outcome]:
    """Run what is out of date of one pipeline.

    Args:
        pipeline: its name in pipelines.yaml.
        refresh: read the corpus sources again, in case their content changed under the same address.
        force: stages to run although they are up to date, such as `pretrain`.

    Raises:
        SettingsError: pipelines.yaml is not valid, has no such pipeline, or names what nobody can have (preflight.py).
        BusyError: this pipeline is being run already; the message names the process.
        StageError: a stage failed.
    """
    config = settings.load()
    preflight.require(config, pipeline)
    with scratch.workspace("run", pipeline):
        plan = dag.ancestors(dag.last_stage(pipeline))
        refreshed = [f"sources@{config.pipeline(pipeline).corpus}"][:refresh]
        forced = dag.resolve([*(force or []), *refreshed], stages=plan)
        outcomes = stages.run(plan, force=forced)
        report(pipeline, outcomes)
        return outcomes


def report(pipeline: str, outcomes: list[Outcome]) -> None:
    """Say what ran, with the table of results, in the log and as artifacts."""
    from tasks.evaluate import summary

    said = summarise(outcomes)
    get_run_logger().info(said)
    evaluation = summary.read(pipeline)
    columns = summary.titles(evaluation)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {label} | {' | '.join(values)} |" for label, values in summary.rows(evaluation)]
    lines += ["", *summary.notes(evaluation)]
    # As text: browsers refuse to follow a link to a file from a page that a server gave them.
    page = f"The report page is the file `{dag.report_page(pipeline).resolve()}` on {platform.node()}."
    create_markdown_artifact(key=f"upcycle-{slug(pipeline)}", markdown="\n".join([said, "", *lines, "", page]))


def summarise(outcomes: list[Outcome]) -> str:
    """One sentence: what ran and for how long, or that everything is up to date."""
    ran = [f"{o.name} ({o.seconds:.0f} s)" for o in outcomes if o.ran]
    return f"ran {', '.join(ran)}" if ran else "everything is up to date"


def slug(name: str) -> str:
    """A pipeline's name as Prefect wants its keys: lower case, digits and dashes."""
    return name.replace("_", "-")


if __name__ == "__main__":
    environment.connect()
    upcycle(pipeline=sys.argv[1])

"""`moeforge plan` and `moeforge status` as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flows import dag, plan
from tasks import scratch
from tasks.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_REASONS = 3


def stages(name: str) -> Table:
    """Which stages of a pipeline would run, and why."""
    order = dag.ancestors(dag.last_stage(name))
    why = dag.changes([stage.name for stage in order])
    table = _table(f"{name}: what would run", "stage", "", "why")
    would: set[str] = set()
    for stage in order:
        follows = [need for need in stage.needs if need in would]
        if why[stage.name]:
            would.add(stage.name)
            table.add_row(stage.name, "run", shorten(why[stage.name]))
        elif follows:
            would.add(stage.name)
            table.add_row(stage.name, "run if its input changes", f"after {', '.join(follows)}")
        else:
            table.add_row(stage.name, "cached", "up to date")
    return table


def shorten(reasons: list[str]) -> str:
    """The first reasons, and how many more there are."""
    more = len(reasons) - SHOWN_REASONS
    return "; ".join(reasons[:SHOWN_REASONS]) + (f"; and {more} more" if more > 0 else "")


def figures(settings: Settings, name: str, *, tflops: float | None) -> Table:
    """What a pipeline costs. `tflops`: speed of one process, or None to measure this machine."""
    from tasks.pretrain.engine import cpu_has_bfloat16

    pipeline = settings.pipeline(name)
    cost = plan.plan(settings, name, bfloat16=tflops is not None or cpu_has_bfloat16(Path("/proc/cpuinfo")))
    train, experts = pipeline.pretrain, pipeline.partition
    if tflops is None:
        measured, where = plan.calibrate(bfloat16=cost.dtype == "bfloat16")
        processes = train.processes if "CPU" not in where else 1  # processes on one CPU share it
        speed, basis = measured * processes, f"{where}, measured now at {measured / 1e12:.2f} TFLOP/s in {cost.dtype}"
    else:
        processes = train.processes
        speed, basis = tflops * 1e12 * processes, f"the given {tflops:g} TFLOP/s"
    table = _table(f"{name}: what it costs", "", "", "")
    dense, sparse = cost.dense, cost.sparse
    shared = f", {experts.shared_experts} shared" if experts.shared_experts else ""
    table.add_row("dense parent", count(dense["total"]), f"parameters of {pipeline.model}")
    where = f"in {cost.sparse_layers} of {cost.layers} layers of a {cost.model_type}"
    table.add_row(
        "experts", f"{experts.top_k} of {experts.experts}{shared}", f"{cost.expert_width} neurons each, {where}"
    )
    table.add_row("parameters", count(sparse["total"]), "total")
    table.add_row("", count(sparse["active"]), f"active per token, {sparse['active'] / sparse['total']:.1%}")
    table.add_row("training tokens", count(cost.tokens), f"{cost.steps:,} steps of {train.batch} x {train.seq_len}")
    table.add_row("FLOPs", f"{cost.train_flops:.2e}", "training, forward and backward")
    table.add_row("", f"{cost.other_flops:.2e}", "references, calibration, held-out evaluation", end_section=True)
    why = f"{cost.dtype}, ZeRO {train.zero_stage}, {train.processes} process{'es'[: 2 * (train.processes > 1)]}"
    for part, size in cost.memory.items():
        note = {"activations": "estimate for one micro-batch", "total": f"per process ({why})"}.get(part, "")
        table.add_row("memory" if part == "weights" else "", f"{size / 1e9:.2f} GB", f"{part} {note}".strip())
    table.add_section()
    for i, (part, size) in enumerate(cost.disk.items()):
        table.add_row("" if i else "disk", f"{size / 1e9:.2f} GB", part)
    table.add_section()
    note = f"at {plan.UTILISATION:.0%} of {basis}" + (f", {processes} processes" if processes > 1 else "")
    table.add_row("time", clock(cost.seconds(speed)), note)
    return table


def status(settings: Settings) -> Table:
    """Every pipeline of pipelines.yaml."""
    from flows.judgement import accepted
    from tasks.evaluate import summary

    table = _table("pipelines", "pipeline", "state", "out of date", "bits per byte", "accepted")
    for name in settings.pipelines:
        order = [stage.name for stage in dag.ancestors(dag.last_stage(name))]
        stale = [stage for stage, why in dag.changes(order).items() if why]
        try:
            with scratch.workspace("run", name):
                state = "out of date" if stale else "up to date"
        except scratch.BusyError:
            state = "running"
        evaluated = dag.report_page(name).parent.parent.joinpath("evaluation.json").exists()
        result = f"{summary.read(name)['trained']['bits_per_byte']['mean']:.4f}" if evaluated else "–"
        last = accepted(name)
        table.add_row(name, state, ", ".join(stale) or "–", result, f"{last['trained']:.4f}" if last else "–")
    return table


def count(value: float) -> str:
    """6.74 G for 6740000000."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {suffix}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """Seconds as the largest unit that fits: 40 s, 12 min, 5.3 h, 3.5 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table

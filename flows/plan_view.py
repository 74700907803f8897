"""`moeforge plan` and `moeforge status` as tables, with what of a plan this machine does not have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from flows import dag, plan, preflight
from tasks import scratch
from tasks.engines.table import ENGINES
from tasks.moe import device as devices
from tasks.pretrain.checkpoints import branch
from tasks.pretrain.log import meters
from tasks.settings import Pipeline, Pretrain, Settings

if TYPE_CHECKING:
    from rich.table import Table

    from tasks.partition.shapes import Verdict
    from tasks.settings.partition import Engine
    from tasks.tools.estimate import Memory, Speed

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


def figures(settings: Settings, name: str, *, tflops: float | None, calibrated: bool = False) -> list[Table]:
    """What a pipeline costs, and what a training process needs by ZeRO stage.

    Args:
        tflops: speed of one process on another machine, which has GPUs; None to measure this one.
        calibrated: run a few training steps here, and take the time from them.

    Raises:
        TrainingError: the steps failed.
    """
    import torch

    from tasks.moe.device import cpu_has_bfloat16
    from tasks.tools import calibrate

    pipeline = settings.pipeline(name)
    train = pipeline.pretrain
    cuda = tflops is not None or torch.cuda.is_available()
    cost = plan.plan(settings, name, bfloat16=cuda or cpu_has_bfloat16(), cuda=cuda)
    speed = None
    if calibrated:
        dense = plan.dense_config(settings, pipeline.model)
        speed = calibrate.measure(
            plan.converted_config(settings, name), train, parent=dense if train.distill else None
        )
    table = _costs(cost, pipeline, here=tflops is None)
    for line in dict.fromkeys([*preflight.training(train), *preflight.warnings(settings, name)[-1:]]):
        table.add_row("better", "", line)
    for i, short in enumerate(plan.short_windows(settings, name)):
        table.add_row("" if i else "windows", "fewer", short)
    if speed:
        domains = len(settings.corpus(pipeline.corpus).trained)
        _measured_time(table, speed, train, spent=speed.run(train, domains=domains, checkpoint=cost.checkpoint))
    else:
        _estimated_time(table, cost, train, tflops=tflops)
    return [table, _memory(cost, train, here=tflops is None, measured=speed)]


def _costs(cost: plan.Plan, pipeline: Pipeline, *, here: bool) -> Table:
    train, experts = pipeline.pretrain, pipeline.partition
    table = _table(f"{cost.pipeline}: what it costs", "", "", "")
    dense, sparse = cost.dense, cost.sparse
    shared = f", {experts.shared_experts} shared" if experts.shared_experts else ""
    table.add_row("dense parent", count(dense["total"]), f"parameters of {pipeline.model}")
    where = f"in {cost.sparse_layers} of {cost.layers} layers of a {cost.model_type}"
    table.add_row(
        "experts", f"{experts.top_k} of {experts.experts}{shared}", f"{cost.expert_width} neurons each, {where}"
    )
    for k in experts.elastic or ():
        width = cost.expert_width * (experts.experts + experts.shared_experts)
        table.add_row(
            "", f"top_k {k}", f"{experts.active(width, top_k=k):.0%} of each FFN active, by an engine's override"
        )
    for each in cost.engines:
        table.add_row(ENGINES[each.engine].title, *_engine(each, experts.engines))
    table.add_row("parameters", count(sparse["total"]), "total")
    table.add_row("", count(sparse["active"]), f"active per token, {sparse['active'] / sparse['total']:.1%}")
    table.add_row("training tokens", count(cost.tokens), f"{cost.steps:,} steps of {train.batch} x {train.seq_len}")
    if step := branch.outlook(cost.pipeline, train):
        table.add_row(
            "", f"step {step:,}", "kept of an earlier run, which goes on from there if its inputs are the same"
        )
    table.add_row("FLOPs", f"{cost.train_flops:.2e}", "training, forward and backward")
    table.add_row("", f"{cost.other_flops:.2e}", "references, calibration, distillation, evaluation")
    if mixture := cost.mixture:
        trainings = f"{mixture.trainings:,} training{'s' if mixture.trainings != 1 else ''}"
        table.add_row("domain weights", trainings, f"of a proxy: {mixture.what}")
        if mixture.done:
            table.add_row("", f"{mixture.done:,} more", "are there, and count if their inputs are the same")
        table.add_row("", count(mixture.tokens), f"tokens of proxies, {mixture.share:.1%} of the training tokens")
        table.add_row("", f"{mixture.flops:.2e}", f"FLOPs, {mixture.flops_share:.1%} of those of the training")
    if pruned := cost.pruned:
        table.add_row("pruned baseline", count(pruned.parameters), f"parameters, {_shape(pruned.shape)}")
        table.add_row("", f"{pruned.flops:.2e}", "FLOPs of its cut, training on the same tokens, and evaluation")
        table.add_row("", gigabytes(_peak(pruned.memory)), "peak memory of its training, rank 0")
        for title, training in pruned.beside.items():
            table.add_row(title, f"{training.flops:.2e}", f"FLOPs of {training.steps:,} steps of the parent")
            table.add_row("", gigabytes(_peak(training.memory)), "peak memory of this training, rank 0")
    table.add_section()
    for i, (part, size) in enumerate(cost.disk.items()):
        table.add_row("" if i else "disk", gigabytes(size), part)
    table.add_row("", gigabytes(sum(cost.disk.values())), "total")
    for lack in plan.disk_lacks(cost, pipeline.model) if here else ():
        table.add_row("", "", lack)
    table.add_section()
    return table


def _shape(sizes: Mapping[str, int]) -> str:
    """The sizes of a pruned baseline that are not its parent's."""
    named = {
        "intermediate_size": "FFNs of {} neurons",
        "num_hidden_layers": "{} layers",
        "num_attention_heads": "{} heads",
        "num_key_value_heads": "{} of keys and values",
        "hidden_size": "{} hidden dimensions",
    }
    return ", ".join(text.format(sizes[field]) for field, text in named.items() if field in sizes)


def _peak(memory: Memory) -> float:
    return memory.device_total or memory.host_total


def _engine(found: Verdict, wanted: Collection[Engine]) -> tuple[str, str]:
    """Whether an engine runs the result, and what there is to say about it."""
    asked = "" if found.engine in wanted else "not in `engines`"
    if found.refused:
        return "no", "; ".join(filter(None, (found.refused, asked)))
    return "slowly" if found.slow else "yes", "; ".join(filter(None, (found.slow, asked)))


def _estimated_time(table: Table, cost: plan.Plan, train: Pretrain, *, tflops: float | None) -> None:
    if tflops is None:
        measured, where = matrix_speed(bfloat16=cost.dtype == "bfloat16")
        processes = train.processes if "CPU" not in where else 1  # processes on one CPU share it
        speed, basis = measured * processes, f"{where}, whose peak is {measured / 1e12:.2f} TFLOP/s in {cost.dtype}"
    else:
        processes = train.processes
        speed, basis = tflops * 1e12 * processes, f"the given {tflops:g} TFLOP/s"
    note = f"at {plan.UTILISATION:.0%} of {basis}" + (f", {processes} processes" if processes > 1 else "")
    table.add_row("time", clock(cost.seconds(speed)), note)
    if mixture := cost.mixture:
        table.add_row("", clock(mixture.flops / (plan.UTILISATION * speed)), "of which the estimate of domain weights")


def _measured_time(table: Table, speed: Speed, train: Pretrain, *, spent: dict[str, float]) -> None:
    step = speed.step(train)
    others = f"; {train.processes} processes are taken to be as fast as {speed.processes} here"
    note = f"a step of {step:.2f} s, measured now" + (others if speed.processes != train.processes else "")
    table.add_row("speed", f"{count(train.step_tokens / step)} tokens/s", note)
    for i, (part, seconds) in enumerate(spent.items()):
        table.add_row("" if i else "time", clock(seconds), part)
    table.add_row("", clock(sum(spent.values())), "total of the stage pretrain")


def _memory(cost: plan.Plan, train: Pretrain, *, here: bool, measured: Speed | None) -> Table:
    """A row a ZeRO stage; `here`: say which do not fit into this machine's memory."""
    many = f"rank 0 of {train.processes}" if train.processes > 1 else "the process"
    beside = train.processes - 1 if train.launcher == "local" else 0
    columns = ("ZeRO", "weights", "gradients", "optimizer", "activations", "other", "total", "in RAM", "")
    table = _table(f"{cost.pipeline}: peak memory of {many} in {cost.dtype}, GB", *columns)
    for stage, (memory, other) in cost.memory.items():
        parts = memory.device or memory.host
        known = ("weights", "gradients", "optimizer")
        shown = [parts.get(part, 0.0) for part in known]
        shown.append(parts["activations"] + parts["logits"])
        shown.append(sum(parts.values()) - sum(shown))
        shown += [sum(parts.values()), memory.host_total]
        figures = [f"{size / 1e9:.2f}" for size in shown]
        mark = "set" if stage == train.zero_stage else ""
        short = lacks(memory, [other] * beside) if here else ""
        table.add_row(str(stage), *figures, "; ".join(filter(None, (mark, short))))
    if measured:
        where = "GPU" if cost.memory[train.zero_stage][0].device else "RAM"
        peak, blank = f"{measured.peak / 1e9:.2f}", [""] * 5
        table.add_row("", *blank, peak, "", f"measured now in {where}, without a checkpoint's copy")
    return table


def lacks(first: Memory, others: list[Memory]) -> str:
    """What of this machine the processes that run on it need more of than there is; empty if they fit."""
    import psutil
    import torch

    short = []
    ram = psutil.virtual_memory().total
    if (needed := sum(memory.host_total for memory in (first, *others))) > ram:
        short.append(f"RAM: {needed / 1e9:.1f} of {ram / 1e9:.1f} GB")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory
        if first.device_total > card:
            short.append(f"GPU: {first.device_total / 1e9:.1f} of {card / 1e9:.1f} GB")
    return f"does not fit here ({', '.join(short)})" if short else ""


def matrix_speed(*, bfloat16: bool) -> tuple[float, str]:
    """FLOP/s of one process on this machine (`meters.peak`), and what computes them: a GPU, or all CPU threads."""
    import torch

    device = torch.device(devices.default())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return meters.peak(device, torch.bfloat16 if bfloat16 else torch.float32), where


def status(settings: Settings) -> Table:
    """Every pipeline of pipelines.yaml."""
    from flows.quality_gate import accepted
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


def gigabytes(size: float) -> str:
    """1.30 GB for 1300000000."""
    return f"{size / 1e9:.2f} GB"


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

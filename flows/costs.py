"""`moeforge flops` and `moeforge speedup`: what a model costs by its config, and what a run had cost by its log.

moeforge flops demo
moeforge flops runs/demo/trained data/models/smollm2-135m-q4 --seq-len 2048
moeforge speedup runs/demo --against runs/demo/control
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.terminal import clear_errors, show
from tasks import settings

if TYPE_CHECKING:
    from rich.table import Table

CONTEXTS = (1, 512, 4096)
"""Numbers of cached tokens at which a token is decoded."""


def flops(
    names: Annotated[list[str], typer.Argument(metavar="PATH...", help="Pipelines, or folders of checkpoints.")],
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=1, help="Tokens of a sequence or prompt, else those of the training, or 2048."),
    ] = None,
) -> None:
    """Count a model's parameters and FLOPs, in training, reading a prompt and decoding, from its config alone.

    A multiply-add counts as two; norms, activations and softmax are left out, masked scores are not. A pipeline need
    not have been run.
    """
    with clear_errors():
        for name in names:
            configs, length = _configs(name)
            show(flops_table(configs, title=name, seq_len=seq_len or length or 2048))


def speedup(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/demo.")],
    against: Annotated[
        list[Path],
        typer.Option(
            "--against", metavar="RUN", help="What they are compared with; of several, the cheapest at each loss."
        ),
    ],
) -> None:
    """Say by how much less each run reaches a validation loss than another, in tokens, FLOPs and seconds.

    The cost is interpolated between neighbouring evaluations, and never extrapolated. A run is runs/NAME, its pruned
    baseline runs/NAME/control, or an unfinished one's folder under .scratch. Losses are comparable on the same corpus
    and validation windows, seconds on the same idle machine.
    """
    from rich.table import Table

    from tasks.evaluate import run_curves

    with clear_errors():
        others = [run_curves.read(folder) for folder in against]
        for folder in runs:
            run = run_curves.read(folder)
            rows, reasons = run_curves.rows(others, run)
            title = f"{run.name} against {' / '.join(other.name for other in others)}"
            table = Table(*run_curves.COLUMNS, title=title, title_justify="left")
            for label, cells in rows:
                table.add_row(label, *cells)
            show(table)
            for reason in reasons:
                print(f"no factor: {reason}")
        print(run_curves.explanation(" / ".join(map(str, against)), "the run"))


def _configs(name: str) -> tuple[dict[str, Any], int | None]:
    """{title: config} of a checkpoint or of a pipeline's models, and the pipeline's training length."""
    if (file := Path(name, "config.json")).is_file():
        from tasks import rewritten

        return {"": rewritten.config(json.loads(file.read_text()))}, None
    if Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no checkpoint here (config.json is missing)")
    from flows import plan

    config = settings.load()
    pipeline = config.pipeline(name)
    dense = plan.dense_config(config, pipeline.model)
    models = {"dense parent": dense, "Mixture-of-Experts": plan.sparse_config(dense, pipeline.partition)}
    if pipeline.pruned:
        models["pruned baseline"] = pipeline.pruned.config(dense, pipeline.partition)
    return models, pipeline.pretrain.seq_len


def flops_table(configs: Mapping[str, Any], *, title: str, seq_len: int) -> Table:
    """A column for each model, and for each top_k of an elastic one.

    Raises ValueError for a class that is not known here.
    """
    from rich.table import Table

    from tasks import architectures
    from tasks.evaluate.summary import count
    from tasks.moe import counts

    models = {}
    for name, config in configs.items():
        models[name] = config
        for top_k in architectures.elastic(config):
            models[f"{name} top_k {top_k}".strip()] = counts.at_top_k(config, top_k)
    table = Table(title=f"{title}: FLOPs with sequences and prompts of {seq_len:,} tokens", title_justify="left")
    for column in ("", *models):
        table.add_column(column, justify="right" if table.columns else "left")
    rows: dict[str, Callable[[Any], int]] = {
        "parameters": lambda config: counts.parameters(config)["total"],
        "active parameters": lambda config: counts.parameters(config)["active"],
        "forward, per token": lambda config: counts.flops_per_token(config, seq_len=seq_len)["forward"],
        "training, per token": lambda config: counts.flops_per_token(config, seq_len=seq_len)["train"],
        "added by gradient checkpointing": lambda c: counts.recomputed_flops_per_token(c, seq_len=seq_len),
        "prompt, up to the first token": lambda config: counts.prompt_flops(config, tokens=seq_len),
    }
    for label, of in rows.items():
        table.add_row(label, *(count(of(config)) for config in models.values()))
    for context in CONTEXTS:
        cells = [count(counts.decode_flops(config, context=context)) for config in models.values()]
        table.add_row(f"decoding a token after {context:,}", *cells)
    return table

"""`moeforge evaluate`: any checkpoint on this disk, judged beside others on the same text, as one page.

moeforge evaluate runs/demo/trained --against data/models/smollm2-135m-q4 runs/demo/control/model --corpus demo
moeforge evaluate some/checkpoint --text book.txt --tasks hellaswag_100
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows import environment, export
from flows.terminal import clear_errors, fail, raise_on_sigterm, show


def evaluate(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint's folder, or a pipeline that was run.")],
    against: Annotated[
        list[str] | None, typer.Option("--against", metavar="PATH", help="Compare with it; may be given three times.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="NAME", help="Judge on the test text of this corpus.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", help="Judge on a text file, or on the heldout.json of a model's folder."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="NAME", help="A suite or a task of lm-eval; may be given several times."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Items of each task, else all.")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option("--measure", metavar="FIELD=VALUE", help="A plug-in's setting, such as analyses=all."),
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of each domain.")] = 8,
    unseen_windows: Annotated[int, typer.Option("--unseen-windows", min=1, help="Of each unseen domain.")] = 4,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows per forward pass.")] = 4,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the weights.")] = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Else evaluations/NAME, by the folder's name.")
    ] = None,
) -> None:
    """Judge a checkpoint, dense or sparse, this project's or not, beside others: text, tasks, load of the experts.

    No code of a checkpoint is run, and no pickle is opened. Those with another tokenizer than the text's are compared
    by bits per byte. Stopped or killed, it goes on with the part that it was at.
    """
    environment.prepare()
    raise_on_sigterm()
    with clear_errors():
        from tasks.tools.evaluate import __main__ as command
        from tasks.tools.evaluate import table

        found = [export.checkpoint(each) for each in [path, *(against or [])]]
        folder = output or command.default_output(found[0][1])
        try:
            result = command.run(
                [each for each, _ in found],
                folder,
                corpus=corpus,
                text=text,
                tasks=tasks or (),
                limit=limit,
                measure=measure or (),
                seq_len=seq_len,
                windows=windows,
                unseen_windows=unseen_windows,
                batch=batch,
                dtype=dtype,
            )
        except ValueError as error:
            fail(str(error))
        show(table.table(result))
        print(f"page: {(folder / 'index.html').resolve()}")

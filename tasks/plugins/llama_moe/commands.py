"""`moeforge import`: a checkpoint that LLaMA-MoE released becomes a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a released checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.")],
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Corpus on whose training windows linear routers are fitted.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many of them.")] = 32,
) -> None:
    """Turn a checkpoint that LLaMA-MoE released (v1 or v2) into a stock one, without its code.

    Of a two-layer gate, the exact weights are kept beside it, and the routers are linear ones fitted to it.
    """
    from tasks.plugins.llama_moe import conversion

    ids_BL = conversion.windows(source, corpus, count=windows) if corpus else None
    report = conversion.convert(source, target, ids_BL=ids_BL)
    for line in conversion.describe(report, source=source, target=target, corpus=corpus):
        print(line)


COMMANDS = {"import": (import_, "moeforge import LLaMA-MoE-v1-3_5B-4_16 llama-moe --corpus data/corpora/slim")}

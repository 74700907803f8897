"""`moeforge export`: a model as a GGUF file for llama.cpp and Ollama, and the command lines of all engines.

moeforge export demo                                # the command lines alone
moeforge export demo --gguf --quantise Q8_0         # runs/demo/export/demo-Q8_0.gguf and its Modelfile too
moeforge export demo --child --gguf                 # the same of its pruned baseline: demo-child-F16.gguf
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.terminal import clear_errors, fail
from tasks import settings

if TYPE_CHECKING:
    from tasks.settings.partition import Engine

RESULTS = ("model", "trained")
"""Folders of runs/NAME that hold a pipeline's result; the first has the model card too."""
CHILD = "control/model"
"""The folder of runs/NAME that holds its pruned baseline."""


def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pipeline that was run, or a checkpoint's folder.")],
    child: Annotated[bool, typer.Option("--child", help="The pruned baseline in place of the result.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF file, and a Modelfile for Ollama.")] = False,
    quantise: Annotated[
        Literal["F32", "F16", "BF16", "Q8_0"] | None, typer.Option("--quantise", help="With --gguf, else F16.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="With --gguf: FILE.gguf, else in an export folder.")
    ] = None,
) -> None:
    """Say how llama.cpp, Ollama, vLLM and SGLang run a model, or why they cannot; with --gguf write their file."""
    with clear_errors():
        if not gguf and (quantise or output):
            fail(f"{'--quantise' if quantise else '--output'} goes with --gguf")
        folder, label = checkpoint(name, child=child)
        file = output or _place(folder) / "export" / f"{label}-{quantise or 'F16'}.gguf"
        if gguf:
            from tasks.engines import gguf as writer

            try:
                written = writer.export(folder, file, kind=quantise or "F16")
            except ValueError as error:
                fail(str(error))
            kinds = ", ".join(f"{count} {kind}" for kind, count in written["tensors"].items())
            print(f"{file}: {written['architecture']}, {written['bytes'] / 1e6:.1f} MB, tensors: {kinds}")
        for line in commands(folder, file if gguf else None, label=label):
            print(line)


def checkpoint(name: str, *, child: bool = False) -> tuple[Path, str]:
    """The folder of a pipeline's result, of its pruned baseline, or of a checkpoint, and a name for the model.

    Raises FileNotFoundError where there is none, and SettingsError for a name that is neither.
    """
    if not child and (folder := Path(name)).joinpath("config.json").is_file():
        return folder, folder.resolve().name
    if not child and folder.is_dir():
        raise FileNotFoundError(f"{name}: no checkpoint here (config.json is missing)")
    pipeline = settings.load().pipeline(name)
    for result in (CHILD,) if child else RESULTS:
        if (folder := Path("runs", name, result)).joinpath("config.json").is_file():
            return folder, f"{name}-child" if child else name
    if child and pipeline.pruned is None:
        raise FileNotFoundError(f"pipelines.{name}.control = none: it has no pruned baseline; set control: pruned")
    raise FileNotFoundError(
        f"runs/{name}/{CHILD if child else RESULTS[0]}: not there yet; run `moeforge run {name}` first"
    )


def _place(folder: Path) -> Path:
    """Where the export folder of a checkpoint stands: in the folder of its run, since DVC watches those below it."""
    runs = Path("runs").resolve()
    if folder.resolve().is_relative_to(runs):
        return Path("runs", folder.resolve().relative_to(runs).parts[0])
    return folder.parent


def commands(folder: Path, file: Path | None, *, label: str) -> Iterator[str]:
    """A line for each engine: how to run a checkpoint with it, or why it cannot.

    Args:
        file: its GGUF file; None if there is none.
    """
    from transformers import AutoConfig

    from tasks import architectures
    from tasks.engines import limits, overrides

    config = AutoConfig.from_pretrained(folder, local_files_only=True)

    def unless_refused(title: str, engine: Engine, command: str, *, length: str) -> str:
        if reason := limits.check(engine, config):
            return f"{title}: no: {reason}"
        tokens = limits.context(engine, config)
        return f"{title}: {command}" + (f" {length} {tokens}" if tokens < config.max_position_embeddings else "")

    if file:
        name = label.lower()
        yield f"llama.cpp: llama-cli -m {file} -c {limits.context('llama.cpp', config)}"
        yield f"Ollama: ollama create {name} -f {file.with_suffix('.Modelfile')} && ollama run {name}"
    elif reason := limits.llama_cpp(config):
        yield f"llama.cpp, Ollama: no: {reason}"
    else:
        yield "llama.cpp, Ollama: add --gguf, which writes their file"
    yield unless_refused("vLLM", "vllm", f"vllm serve {folder}", length="--max-model-len")
    server = f"python -m sglang.launch_server --model-path {folder}"
    yield unless_refused("SGLang", "sglang", server, length="--context-length")
    if more := overrides.by_engine(config):
        values = ", ".join(map(str, architectures.elastic(config)))
        yield f"top_k: {config.num_experts_per_tok} of {values}; for another K add"
        yield from (f"  {engine}: {option}" for engine, option in more.items())

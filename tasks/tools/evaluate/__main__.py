"""Judge a checkpoint, this project's or not, and compare it with others on the same text.

    python -m tasks.tools.evaluate PATH [--against PATH …] --corpus NAME
    python -m tasks.tools.evaluate PATH --text FILE [--tasks NAME …]

PATH is a folder with config.json, safetensors and a tokenizer.json, of any class of causal language models that
transformers has; no code of it is run, and no pickle is opened. Writes evaluation.json and index.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tasks import plugin, scratch, settings
from tasks.settings import harness, suites

if TYPE_CHECKING:
    from tasks.tools.evaluate.passages import Passages
    from tasks.tools.evaluate.request import Dtype

MOST = 4
"""Checkpoints that a chart has colours for."""


def run(
    paths: Sequence[Path],
    output: Path,
    *,
    corpus: str | None = None,
    text: Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    measure: Sequence[str] = (),
    seq_len: int = 512,
    windows: int = 8,
    unseen_windows: int = 4,
    batch: int = 4,
    dtype: Dtype = "float32",
) -> dict[str, Any]:
    """Judge checkpoints; write `output`/evaluation.json and index.html.

    Args:
        paths: the first is compared with the others.
        corpus: one that was made here, on whose test text they are judged.
        text: a text file, or the heldout.json in the folder of a model. Without either, the heldout.json in the first.
        tasks: suites and lm-eval tasks; one that pipelines.yaml gives a source is read from there.
        limit: items of each task.
        measure: settings of plug-ins, FIELD=VALUE or FIELD=VALUE,VALUE, such as analyses=all.
        seq_len, windows, unseen_windows: tokens of a window; windows of each domain, and of each unseen one.
        batch: windows, or sequences of a task, per forward pass.
        dtype: of the weights.

    Returns:
        judge.evaluate's.

    Raises:
        ValueError, FileNotFoundError: naming the file, the field and the fix.
    """
    from tasks.tools.evaluate import checkpoints, judge, page
    from tasks.tools.evaluate.request import Request

    if len(paths) > MOST:
        raise ValueError(f"{len(paths)} checkpoints; at most {MOST} can be compared at once")
    chosen = _settings(measure, seq_len=seq_len)
    wanted = [task for name in tasks for task in tasks_named(name, limit=limit)]
    found = [checkpoints.examine(path) for path in paths]
    passages = _passages(paths[0], corpus, text, seq_len=seq_len, windows=windows, unseen_windows=unseen_windows)
    request = Request(
        checkpoints=found,
        passages=passages,
        tasks=wanted,
        settings=chosen,
        batch=batch,
        dtype=dtype,
    )
    result = judge.evaluate(request)
    output.mkdir(parents=True, exist_ok=True)
    scratch.write_text(output / "evaluation.json", json.dumps(result, indent=1) + "\n")
    scratch.write_text(output / "index.html", page.render(result))
    return result


def _passages(
    path: Path, corpus: str | None, text: Path | None, *, seq_len: int, windows: int, unseen_windows: int
) -> Passages:
    from tasks.tools.evaluate import passages

    if corpus is not None and text is not None:
        raise ValueError("--corpus and --text: give one of them")
    if corpus is not None:
        return passages.of_corpus(corpus, seq_len=seq_len, windows=windows, unseen_windows=unseen_windows)
    text = text or path / "heldout.json"
    if text == path / "heldout.json" and not text.is_file():
        raise ValueError(f"{path} has no heldout.json; say on what to judge it: --corpus NAME or --text FILE")
    return passages.of_file(text, seq_len=seq_len, windows=windows, tokenizer=path)


def _settings(options: Sequence[str], *, seq_len: int) -> settings.Evaluate:
    """The section `evaluate` with the fields of plug-ins that `options`, FIELD=VALUE,VALUE, set. Raises ValueError."""
    known = plugin.fields("evaluate")
    values: dict[str, Any] = {"seq_len": seq_len}
    for option in options:
        name, _, value = option.partition("=")
        if name not in known:
            raise ValueError(f"--measure {option}: no plug-in has it; they have: {', '.join(known) or 'nothing'}")
        default = known[name][1]
        values[name] = value if isinstance(default, int | str) else value.split(",")
    try:
        return settings.Evaluate.model_validate(values, strict=False)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"--measure {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


def tasks_named(name: str, *, limit: int | None = None) -> list[settings.Task]:
    """The tasks of a suite, or the one called `name`; one that a pipeline of pipelines.yaml has is as it is there.

    Raises ValueError if there is none.
    """
    if name in suites.SUITES:
        return [task.model_copy(update={"limit": limit}) for task in suites.SUITES[name]]
    entries = settings.load().pipelines.values() if Path(settings.text.FILE).is_file() else []
    known = {task.name: task for entry in entries for task in entry.evaluate.tasks}
    if (task := known.get(name)) is None:
        if reason := harness.why_no_items(name, ()):
            raise ValueError(f"--tasks {name}: {reason}")
        task = settings.Task(name=name)
    return [task if limit is None else task.model_copy(update={"limit": limit})]


def default_output(name: str) -> Path:
    """The folder of the result of a checkpoint called `name`."""
    return Path("evaluations", name)


def main() -> int:
    """Judge the checkpoints named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.tools.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="the folder of a checkpoint")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="checkpoints to compare it with")
    parser.add_argument("--corpus", help="a corpus that was made here")
    parser.add_argument("--text", type=Path, help="a text file, or a model's heldout.json")
    parser.add_argument("--tasks", nargs="+", default=[], help="suites, and tasks of lm-eval")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--measure", nargs="+", default=[], metavar="FIELD=VALUE", help="settings of plug-ins")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=8, help="windows of each domain")
    parser.add_argument("--unseen-windows", type=int, default=4, help="windows of each unseen domain")
    parser.add_argument("--batch", type=int, default=4, help="windows per forward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="a folder; evaluations/NAME if absent")
    given = vars(parser.parse_args())
    path, against, output = given.pop("path"), given.pop("against"), given.pop("output")
    try:
        from rich.console import Console

        from tasks.tools.evaluate import table

        output = output or default_output(path.resolve().name)
        Console().print(table.table(run([path, *against], output, **given)))
        print(f"{output / 'index.html'}")
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

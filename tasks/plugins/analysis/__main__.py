"""Analyse the experts and routers of a checkpoint, or of two beside each other.

    python -m tasks.plugins.analysis PATH
    python -m tasks.plugins.analysis PATH --windows heldout.json --json analysis.json
    python -m tasks.plugins.analysis runs/demo/trained --against runs/demo/moe --windows runs/demo/heldout.json \\
        --count 1 --parent data/models/smollm2-135m-q4 --index runs/demo/partition.safetensors

PATH is any Hugging Face checkpoint of a sparse class that is known here (docs/model.md), in safetensors, made by this
project or not. One layer of it at a time is in memory, in float32. Weights are analysed as they lie; what needs a text
runs the model on windows, and then feeds each layer's input to all of its experts. A killed run, started again, goes
on with the next layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tasks import code, scratch


def main(argv: list[str] | None = None) -> int:
    """Run the analyses that the command line names, and print and write their figures."""
    from tasks.plugins.analysis.registry import ANALYSES

    args = _parser(list(ANALYSES)).parse_args(argv)
    try:
        result = _analyse(args)
        print(table(result))
        if args.json is not None:
            scratch.write_text(args.json, json.dumps(result) + "\n")
            print(f"figures of every layer: {args.json}")
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(known: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.plugins.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"analyses: {', '.join(known)} (docs/plugins/analysis.md says what each one measures)",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint folder")
    parser.add_argument("--against", type=Path, metavar="PATH", help="another one of the same experts, as of before")
    parser.add_argument(
        "--windows", type=Path, metavar="FILE", help="JSON of token ids, {domain: [[ids]]}, or plain text"
    )
    parser.add_argument("--count", type=int, metavar="N", help="take N windows of each domain; all if absent")
    parser.add_argument("--parent", type=Path, metavar="PATH", help="the dense checkpoint that it was made from")
    parser.add_argument(
        "--index",
        type=Path,
        metavar="FILE",
        help="partition.safetensors, the parent's neuron at each place; without it every expert is a whole FFN",
    )
    parser.add_argument("--analyses", nargs="+", metavar="NAME", default=known, help="which ones; all if absent")
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="numbers of layers; all sparse ones if absent"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every layer there")
    return parser


def _analyse(args: argparse.Namespace) -> dict[str, Any]:
    from tasks.moe import device
    from tasks.plugins.analysis import run, text

    if args.index is not None and args.parent is None:
        raise ValueError("--index says which of the parent's neurons the experts have; give --parent too")
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count = {args.count}: at least one window of each domain")
    paths = [path for path in (args.against, args.path) if path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--against = {args.against} is the same folder as PATH")
    inputs: dict[str, Any] = {name: str(value) for name, value in vars(args).items() if name != "json"}
    inputs |= {"files": [_stamp(path) for path in (*paths, args.parent, args.windows, args.index) if path is not None]}
    inputs |= {"code": code.fingerprint("tasks.plugins.analysis")}
    name = scratch.fingerprint(str(args.path.resolve()))
    with scratch.workspace("analysis", name, inputs=inputs) as folder:
        result = run.analyse(
            {str(path): path for path in paths},
            args.analyses,
            windows=None if args.windows is None else text.read(args.windows, tokenizer=args.path, count=args.count),
            folder=folder,
            parent=args.parent,
            index=args.index,
            layers=args.layers,
            device=device.default(),
            progress=lambda line: print(line, flush=True),
        )
        shutil.rmtree(folder)
    return result


def _stamp(path: Path) -> dict[str, Any]:
    """Sizes and times of a file, or of the files of a folder; to read all of a large checkpoint would take minutes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {str(file.resolve()): (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}


def table(result: dict[str, Any]) -> str:
    """The means over the layers, a column for each model, and of two models the difference."""
    keys = list(result["models"])
    lines = [f"{i + 1}: {key}" for i, key in enumerate(keys)]
    if (text := result["text"]) is not None:
        lines.append(f"text: {text['tokens']:,} tokens; windows: {text['windows']}")
    for analysis in result["analyses"].values():
        lines += ["", analysis["title"]]
        first = next(iter(analysis["models"].values()))
        for chart, series in first["mean"].items():
            for label in series:
                values = [analysis["models"].get(key, {"mean": {}})["mean"].get(chart, {}).get(label) for key in keys]
                cells = ["–" if value is None else f"{value:z.4f}" for value in values]
                if len(values) == 2 and None not in values:
                    cells.append(f"{values[1] - values[0]:+z.4f}")
                lines.append(f"  {f'{chart}: {label}':64}" + "".join(f"{cell:>10}" for cell in cells))
        for number, key in enumerate(keys, start=1):
            if (of_model := analysis["models"].get(key)) is not None:
                every = len(of_model["layers"])
                lines += [
                    f"  {number}: undefined in {len(layers)} of {every} layers: {reason}"
                    for reason, layers in of_model["undefined"].items()
                ]
    lines += [f"{name}: left out; it {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

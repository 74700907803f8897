"""Prompt and decode speed of a finished run beside its dense parent, and its dense child if there is one.

    python -m bench.speed RUN [--threads 1 2] [--json FILE]

In transformers as AutoModelForCausalLM gives it, with moe_kernels, both in float32 and, if the processor has it,
bfloat16, and in llama.cpp in Q8_0. The models take turns. Figures are medians over the repeats, with the lowest and
the highest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import common
from tasks import settings
from tasks.engines import turns
from tasks.evaluate.speeds import speed
from tasks.moe import device

ENGINES = ("transformers", "llama.cpp")


def of_run(name: str) -> tuple[dict[str, Path], list[list[int]]]:
    """The checkpoints of a run, and the first held-out window of each domain that it was evaluated on.

    Raises FileNotFoundError if it is not done.
    """
    run = Path("runs") / name
    folders = {
        speed.PARENT: Path("data/models") / settings.load().pipeline(name).model,
        "child": run / "control/model",
        "trained": run / "trained",
    }
    if not (run / "heldout.json").is_file():
        raise FileNotFoundError(f"{run}/heldout.json does not exist; `moeforge run {name}` writes it")
    if not folders["child"].is_dir():
        print(f"{folders.pop('child')} does not exist; the dense child is left out", file=sys.stderr)
    return folders, [windows[0] for windows in json.loads((run / "heldout.json").read_text()).values()]


def measure(
    folders: Mapping[str, Path], text: turns.Text, *, engines: Sequence[str], threads: Sequence[int], scratch: Path
) -> list[speed.Row]:
    """The rows of the engines, those of llama.cpp first."""
    rows = []
    if "llama.cpp" in engines:
        rows += speed.in_llama_cpp(
            folders, text, threads=threads, scratch=scratch, progress=lambda line: print(line, file=sys.stderr)
        )
    if "transformers" in engines:
        dtypes = ["float32", *["bfloat16"] * device.has_bfloat16("cpu")]
        rows += speed.in_transformers(folders, text, dtypes=dtypes, threads=threads)
    return rows


def table(rows: Sequence[speed.Row], text: turns.Text) -> Iterator[str]:
    """Lines of a table in Markdown."""
    titles = ("engine, dtype, threads", "model", f"prompt of {text.prompt}, tokens/s", "×", "decode, tokens/s", "×")
    yield f"| {' | '.join((*titles, 'peak memory, MB'))} |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for row in rows:
        where = f"{row['engine']}, {row['dtype']}, {row['threads']}"
        for name, figures in row["models"].items():
            if "reason" in figures:
                yield f"| {where} | {name} | {figures['reason']} | | | |"
                continue
            experts = figures.get("experts", row["engine"])
            shown = name if experts == row["engine"] else f"{name} ({experts})"
            cells = [
                cell(group.get(what), digits=digits)
                for what in ("prompt", "decode")
                for group, digits in ((figures, 1), (figures.get("ratio", {}), 2))
            ]
            cells.append(f"{figures['memory'] / 1e6:,.0f}" if "memory" in figures else "–")
            yield f"| {where} | {shown} | {' | '.join(cells)} |"


def cell(spread: Mapping[str, float] | None, *, digits: int) -> str:
    """The median, and the lowest and the highest; a dash where nothing was measured."""
    if not spread:
        return "–"
    median, low, high = (f"{spread[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a finished pipeline")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and the number of cores")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--new", type=int, default=48, help="tokens that are decoded in a repeat (default: 48)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    arguments = parser.parse_args(argv)
    threads = arguments.threads or sorted({1, speed.cores()})
    with tempfile.TemporaryDirectory() as folder:
        try:
            folders, (ids, *_) = of_run(arguments.run)
            text = turns.Text(ids, new=arguments.new, repeats=arguments.repeats, seconds=600)
            rows = measure(folders, text, engines=arguments.engines, threads=threads, scratch=Path(folder))
        except (ValueError, OSError) as error:
            print(f"speed: {error}", file=sys.stderr)
            return 1
    print(*table(rows, text), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({**speed.basis(text), "engines": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The table of five rows with which README begins, from an evaluation.json.

python -m tasks.evaluate.headline runs/demo/evaluation.json                       # print it
python -m tasks.evaluate.headline runs/demo/evaluation.json --readme README.md    # put it between README's markers
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.evaluate.speeds import speed_table

TITLES = {"dense": "dense parent", "trained": "MoE", "child": "pruned baseline"}
"""{model of evaluation.json: its column}, in order."""
_BLOCK = re.compile(r"(<!-- table: demo -->\n).*?(<!-- end -->)", re.DOTALL)


def table(evaluation: Mapping[str, Any]) -> str:
    """Perplexity, active and all parameters, decode speed and memory of parent, MoE and baseline, in Markdown.

    Speed and memory are those of the engine of `speed_table.headline`, left out if none was measured.
    """
    models = [key for key in TITLES if key in evaluation]
    rows = {
        "perplexity, test text": [f"{evaluation[key]['perplexity']['mean']:.2f}" for key in models],
        "active parameters": [f"{evaluation[key]['parameters']['active'] / 1e6:.1f} M" for key in models],
        "all parameters": [f"{evaluation[key]['parameters']['total'] / 1e6:.1f} M" for key in models],
    }
    if row := speed_table.headline(evaluation.get("speed") or {}):
        measured = [row["models"].get(key, {}) for key in models]
        name = speed_table.title(row)
        rows[f"decode speed, {name}"] = [
            f"{each['ratio']['decode']['median']:.2f} ×" if "ratio" in each else "–" for each in measured
        ]
        rows[f"memory, {name}"] = [f"{each['memory'] / 1e6:.0f} MB" if "memory" in each else "–" for each in measured]
    lines = [["", *(TITLES[key] for key in models)], ["---", *["---:"] * len(models)]]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)


def placed(readme: str, evaluation: Mapping[str, Any]) -> str:
    """The text of a README with the table between its markers. Raises ValueError if it has no markers."""
    if not _BLOCK.search(readme):
        raise ValueError("no `<!-- table: demo -->` and `<!-- end -->` to put the table between")
    return _BLOCK.sub(lambda match: match[1] + table(evaluation) + match[2], readme)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args(argv)
    evaluation = json.loads(arguments.evaluation.read_text())
    if arguments.readme:
        arguments.readme.write_text(placed(arguments.readme.read_text(), evaluation))
    else:
        print(table(evaluation), end="")


if __name__ == "__main__":
    main()

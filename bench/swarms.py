"""Fits the laws of `regmix` and `olmix` to public swarms, and ranks mixtures that they have not seen.

    python -m bench.swarms                      # fetches RegMix's tables; about 3 minutes on 2 cores
    python -m bench.swarms --tables FOLDER      # tables that are there already, RegMix's or Olmix's
    python -m bench.swarms --units 72           # a swarm of four units for each constant of the law

Prints Spearman's rank correlation x 100 on held-out mixtures for each loss: as RegMix's notebook prints it, by the
notebook's procedure (the mixes that are reported also stop the boosting), by `regmix` (units of the fit stop it), by
the log-linear law of `olmix`, and by a linear regression. Tables of Olmix (ratios.csv and metrics.csv, from
https://huggingface.co/datasets/allenai/olmix) are cut into fifths, of which each is predicted by the others.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.mixture import olmix, regmix
from tasks.mixture.proxies import evidence

Array = NDArray[np.float64]
COMMIT = "b004d3a3f39846dcec6b3740da22bcd1ba95a5d0"
ADDRESS = f"https://raw.githubusercontent.com/sail-sg/regmix/{COMMIT}/data"
FITTED = ("train_mixture_1m.csv", "train_pile_loss_1m.csv")
HELD_OUT = {
    "1M": ("test_mixture_1m.csv", "test_pile_loss_1m.csv"),
    "60M": ("test_mixture_60m.csv", "test_pile_loss_60m.csv"),
    "1B": ("test_mixture_1B.csv", "test_pile_loss_1B.csv"),
}
PUBLISHED = {
    "arxiv": 99.6, "freelaw": 99.71, "pubmed_central": 99.08, "wikipedia_en": 99.45, "dm_mathematics": 97.2,
    "github": 99.77, "stackexchange": 99.73, "gutenberg_pg_19": 99.18, "pile_cc": 98.92, "ubuntu_irc": 96.87,
    "hackernews": 98.51, "pubmed_abstracts": 99.19, "uspto_backgrounds": 99.12,
}  # fmt: skip
"""At 1M, as regression_fitting/regression.ipynb prints it."""
PRIOR = [
    0.11328527, 0.07960865, 0.00391349, 0.1853759, 0.05108136, 0.01596293, 0.10175077, 0.00370752, 0.06652935,
    0.00175077, 0.02708548, 0.23686921, 0.01184346, 0.00792997, 0.00803296, 0.03882595, 0.04644696,
]  # fmt: skip
OPTIMUM = 0.890924344
"""The share of Pile-CC in the notebook's best mix for the loss on Pile-CC."""
OF = "pile_cc"
META = {"run", "name", "index", "run_id", "run_name", "id"}

Fit = Callable[[Array, Array], Callable[[Array], Array]]


def fetch(folder: Path) -> None:
    """Download RegMix's tables of one commit into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({*FITTED, *(name for pair in HELD_OUT.values() for name in pair)}):
        if not (folder / name).exists():
            with urllib.request.urlopen(f"{ADDRESS}/{name}", timeout=60) as response:
                (folder / name).write_bytes(response.read())


def table(path: Path) -> tuple[list[str], Array]:
    """Names of the columns of numbers but the first, which numbers the rows, and the numbers."""
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    kept = [i for i, name in enumerate(header) if i and name not in META and _number(rows[0][i])]
    return [_plain(header[i]) for i in kept], np.array([[float(row[i]) for i in kept] for row in rows])


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    return name.removeprefix("train_the_pile_").removeprefix("metric/the_pile_").removesuffix("_val_loss")


def linear(weights_UD: Array, losses_U: Array) -> Callable[[Array], Array]:
    """A linear regression with an intercept."""
    constants = np.linalg.lstsq(np.column_stack([np.ones(len(losses_U)), weights_UD]), losses_U, rcond=None)[0]
    return lambda mixes_UD: constants[0] + mixes_UD @ constants[1:]


LAWS: dict[str, Fit] = {"regmix": regmix.fit, "olmix": olmix.fit, "linear": linear}


def of_regmix(folder: Path, *, units: int | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Print the table of RegMix's swarm; returns {scale: {loss: {law: Spearman x 100}}}.

    `units`: fit to the first so many of the 512.
    """
    (_, mixes_UD), (losses, values_UL) = (table(folder / name) for name in FITTED)
    mixes_UD, values_UL = mixes_UD[:units], values_UL[:units]
    tests = {scale: tuple(table(folder / name) for name in pair) for scale, pair in HELD_OUT.items()}
    result: dict[str, dict[str, dict[str, float]]] = {scale: {} for scale in tests}
    seconds = dict.fromkeys(("notebook", *LAWS), 0.0)
    for i, loss in enumerate(losses):
        own = tests["1M"]
        stop = own[0][1], own[1][1][:, own[1][0].index(loss)]
        ways: dict[str, Fit] = {"notebook": lambda x, y, stop=stop: regmix.boosted(x, y, stop=stop), **LAWS}  # type: ignore[misc]
        for name, fit in ways.items():
            began = time.perf_counter()
            law = fit(mixes_UD, values_UL[:, i])
            seconds[name] += time.perf_counter() - began
            for scale, ((_, mixes), (measured, values)) in tests.items():
                if loss in measured:
                    rank = evidence.spearman(law(mixes), values[:, measured.index(loss)])
                    result[scale].setdefault(loss, {})[name] = 100 * (rank or 0.0)
            if (name, loss) == ("notebook", OF):
                share = regmix.propose(law, regmix.candidates(np.array(PRIOR), caps_D=np.ones(len(PRIOR))))[11]
                print(
                    f"best mix for {OF}: its share {share:.4f} by the notebook's procedure, published {OPTIMUM:.4f}",
                    flush=True,
                )
    for scale, rows in result.items():
        print(f"\nfitted at 1M ({len(mixes_UD)} mixes), ranked at {scale} ({len(tests[scale][0][1])} mixes)")
        print(f"{'loss':<18} {'published':>9} " + " ".join(f"{name:>9}" for name in seconds))
        for loss, row in rows.items():
            known = f"{PUBLISHED[loss]:9.2f}" if scale == "1M" else " " * 9
            print(f"{loss:<18} {known} " + " ".join(f"{row[name]:9.2f}" for name in seconds))
        known = f"{np.mean(list(PUBLISHED.values())):9.2f}" if scale == "1M" else " " * 9
        means = {name: float(np.mean([row[name] for row in rows.values()])) for name in seconds}
        print(f"{'mean':<18} {known} " + " ".join(f"{means[name]:9.2f}" for name in seconds))
    print("\nseconds of all fits: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    return result


def of_olmix(folder: Path) -> dict[str, float]:
    """Print the mean over a swarm's losses of the correlation on held-out fifths; returns it by law."""
    (_, mixes_UD), (losses, values_UL) = table(folder / "ratios.csv"), table(folder / "metrics.csv")
    means: dict[str, Any] = {}
    for name, fit in LAWS.items():
        ranks = [
            evidence.spearman(evidence.held_out(fit, mixes_UD, values_UL[:, i], seed=0), values_UL[:, i])
            for i in range(len(losses))
        ]
        means[name] = 100 * float(np.mean([rank for rank in ranks if rank is not None]))
    shown = "  ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    print(f"{folder}: {len(mixes_UD)} mixes of {mixes_UD.shape[1]} domains, {len(losses)} losses: {shown}")
    return means


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.swarms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, help="a folder with RegMix's tables, or folders with Olmix's below it")
    parser.add_argument("--units", type=int, help="fit to the first so many of RegMix's 512 mixes")
    parsed = parser.parse_args(arguments)
    folder: Path | None = parsed.tables
    if folder is None:
        folder = Path(".scratch/swarms")
        try:
            fetch(folder)
        except OSError as error:
            print(f"swarms: {ADDRESS} cannot be read ({error}); give --tables FOLDER", file=sys.stderr)
            return 1
    swarms = sorted(path.parent for path in folder.rglob("ratios.csv") if (path.parent / "metrics.csv").exists())
    ours = all((folder / name).exists() for name in FITTED)
    if not swarms and not ours:
        print(f"swarms: {folder} has neither {FITTED[0]} nor ratios.csv with metrics.csv", file=sys.stderr)
        return 1
    if ours:
        of_regmix(folder, units=parsed.units)
    for swarm in swarms:
        of_olmix(swarm)
    return 0


if __name__ == "__main__":
    sys.exit(main())

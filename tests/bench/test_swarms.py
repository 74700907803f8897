from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from bench import swarms
from tasks.mixture import regmix


def write(path: Path, names: list[str], rows: np.ndarray, *, first: str = "index") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([first, *names])
        writer.writerows([i, *row] for i, row in enumerate(rows.tolist()))


def losses(mixes: np.ndarray) -> np.ndarray:
    return np.stack([2 + np.exp(-3 * mixes[:, 0]), 1 + np.exp(-2 * mixes[:, 1])], axis=1)


def test_public_tables_are_ranked_by_every_law_beside_the_published_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regmix, "ROUNDS", 100)
    rng = np.random.default_rng(0)
    domains = ["train_the_pile_arxiv", "train_the_pile_github", "train_the_pile_europarl"]
    for pair, count in ((swarms.FITTED, 60), *((pair, 20) for pair in swarms.HELD_OUT.values())):
        mixes = rng.dirichlet(np.ones(3), count)
        write(tmp_path / pair[0], domains, mixes)
        write(tmp_path / pair[1], ["metric/the_pile_arxiv_val_loss", "metric/the_pile_github_val_loss"], losses(mixes))
    mixes = rng.dirichlet(np.ones(3), 30)
    write(tmp_path / "olmix/ratios.csv", ["a", "b", "c"], mixes, first="run")
    write(tmp_path / "olmix/metrics.csv", ["one", "two"], losses(mixes), first="run")
    assert swarms.main(["--tables", str(tmp_path), "--units", "48"]) == 0
    printed = capsys.readouterr().out
    assert "fitted at 1M (48 mixes), ranked at 1B (20 mixes)" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("arxiv"))
    assert float(row[1]) == 99.6
    assert float(row[4]) > 99  # the losses are olmix's law
    assert "olmix: 30 mixes of 3 domains, 2 losses: regmix" in printed


def test_a_folder_without_tables_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swarms.main(["--tables", str(tmp_path)]) == 1
    assert "has neither train_mixture_1m.csv nor ratios.csv" in capsys.readouterr().err

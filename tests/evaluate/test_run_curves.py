"""Curves from the metrics and the logs of runs, and the table of one run against others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.evaluate import run_curves, speedup_factor
from tasks.evaluate.speedup_factor import Curve
from tasks.moe import counts
from tasks.pretrain.job import Job
from tests.run_logs import COLUMNS, CONFIG, records, training


def test_a_finished_run_and_its_child_are_read_from_their_metrics(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    (run / "control").mkdir(parents=True)
    (run / "pretrain.json").write_text(json.dumps({"curve": COLUMNS | {"loss": [3.0, 2.5, 2.0]}}))
    untimed = {name: values for name, values in COLUMNS.items() if name != "seconds"}
    parent = {"curve": COLUMNS | {"loss": [2.0, 1.9, 1.8]}}
    (run / "control.json").write_text(json.dumps({"curve": untimed | {"loss": [3.5, 3.0, 2.5]}, "parent": parent}))
    assert run_curves.read(run / "control/parent").loss == [2.0, 1.9, 1.8]
    moe, child = run_curves.read(run), run_curves.read(run / "control")
    assert (moe.name, list(moe.costs), moe.loss) == (str(run), ["tokens", "flops", "seconds"], [3.0, 2.5, 2.0])
    assert list(child.costs) == ["tokens", "flops"]
    rows, reasons = run_curves.rows([child], moe)
    assert (list(dict(rows)), reasons) == (["tokens", "flops"], [])
    assert dict(rows)["tokens"] == ["2.00 ×", "2.00 to 2.00 ×", "2.500 (2.500 to 2.500)", "10 (all evaluations)"]


def test_a_run_without_metrics_is_read_from_its_log(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "moe").mkdir()
    (tmp_path / "training/log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records(timed=True)))
    folders = {name: tmp_path / name for name in ("corpus", "parent", "mixture")}
    job = Job(pipeline="demo", params=training(), model=tmp_path / "moe", workspace=tmp_path, **folders)
    job.write()
    with pytest.raises(FileNotFoundError, match=r"its model is not there \(.*moe/config.json\), so its FLOPs cannot"):
        run_curves.read(tmp_path)
    (tmp_path / "moe/config.json").write_text(json.dumps(CONFIG))
    curve = run_curves.read(tmp_path)
    assert curve.loss == pytest.approx([4.0, 3.6, 3.0])
    assert curve.costs["flops"] == [n * counts.flops_per_token(CONFIG, seq_len=16)["train"] for n in (0, 256, 640)]
    assert curve.costs["seconds"] == [0.0, 10.0, 55.0]
    (tmp_path / "pretrain.json").write_text(json.dumps({"tokens_per_second": 64.0}))
    assert run_curves.read(tmp_path).costs["seconds"] == [0.0, 10.0, 55.0]  # of the log
    (tmp_path / "training/log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records(timed=False)))
    assert run_curves.read(tmp_path).costs["seconds"] == [0.0, 4.0, 10.0]  # of the mean speed


def test_a_folder_without_a_run_is_named_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no training run is here .*; give runs/PIPELINE, runs/PIPELINE/contr"
    ):
        run_curves.read(tmp_path)


def test_several_rivals_are_one_and_a_reason_stands_once_for_all_costs() -> None:
    def run(name: str, *losses: float) -> Curve:
        costs = {"tokens": [0.0, 10.0, 20.0], "flops": [0.0, 1e12, 2e12], "seconds": [0.0, 5.0, 10.0]}
        return Curve(name=name, loss=losses, costs=costs)

    rivals = [run("a", 4.0, 3.0, 2.8), run("b", 4.0, 3.2, 2.6)]
    rows, _ = run_curves.rows(rivals, run("moe", 4.0, 2.8, 2.6))
    both = speedup_factor.cheapest(rivals, by="tokens")
    assert (both.loss, both.costs["tokens"]) == ([4.0, 3.0, 2.6], [0.0, 10.0, 20.0])
    assert [label for label, _ in rows] == ["tokens", "flops", "seconds"]
    rows, reasons = run_curves.rows(rivals, run("moe", 2.5, 2.4, 2.3))
    assert all(cells[:3] == ["–"] * 3 for _, cells in rows)
    assert reasons == [
        "no loss was reached in both runs: a / b ends at 2.600, and moe is below that already before training; "
        "nothing is extrapolated."
    ]
    rows, _ = run_curves.rows([run("a", 4.0, 3.0, 2.8)], run("moe", 4.0, 3.1, 2.9))
    assert rows[1][1][3] == "not at the end"

"""The comparison: which rows there are, that one may die, that none is computed twice, and what the table says."""

import itertools
import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest

from bench.partition import compare, rows
from tasks import scratch
from tests.corpus import texts

WHERE = {"model_dir": "data/models/tiny", "corpus_dir": "data/corpora/tiny", "windows": 1}


@pytest.fixture
def project(tiny_project, tiny_model):
    """The tiny project with its model and its corpus."""
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(tiny_model)
    texts.run()
    return tiny_project


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where the results are kept, of rows whose work is `fake`, in processes that start quickly."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(compare, "run", fake)
    return tmp_path / "results.json"


def fake(job):
    """In the place of a row's work, in a process of its own: notes that it ran, or dies."""
    with Path(job.model_dir, "ran").open("a") as file:
        file.write(f"{job.row}\n")
    if job.row == "killed" and not Path(job.model_dir, "fixed").exists():
        os._exit(9)
    if job.row == "wrong":
        raise ValueError("config.json: hidden_size = 0")
    return {"nats": {"prose": 1.0}}


def test_a_row_that_dies_does_not_end_the_table_and_is_the_only_one_to_run_again(tmp_path, results, capsys):
    where = {**WHERE, "model_dir": str(tmp_path)}
    wanted = [compare.Job(row=row, share=50, seed=0, **where) for row in ("killed", "last")]
    assert [row["row"] for row in compare.complete(wanted, results, key="k")] == ["last"]
    assert "killed, 50 % active, seed 0 failed: BrokenProcessPool" in capsys.readouterr().err
    (tmp_path / "fixed").touch()
    assert [row["row"] for row in compare.complete(wanted, results, key="k")] == ["killed", "last"]
    assert (tmp_path / "ran").read_text().split() == ["killed", "last", "killed"]


def test_other_settings_or_inputs_of_a_row_are_computed_anew_and_a_fault_is_told(tmp_path, results, capsys):
    job = compare.Job(row="wrong", share=50, seed=0, **{**WHERE, "model_dir": str(tmp_path)})
    scratch.write_json(results, {scratch.fingerprint([compare.asdict(job), "old key"]): {"row": "wrong"}})
    assert compare.complete([job], results, key="old key") == [{"row": "wrong"}]
    assert compare.complete([job], results, key="new key") == []
    assert "failed: ValueError: config.json: hidden_size = 0" in capsys.readouterr().err


def test_every_row_has_the_share_of_the_ffn_active_that_it_is_listed_under():
    for width in (1536, 128 * 3):
        for name, by_share in rows.methods(width).items():
            for share, partition in by_share.items():
                size = partition.check_width(width)
                active = (partition.top_k + partition.shared_experts) * size
                assert active == width * share // 100, (name, share)


def test_rows_that_depend_on_a_seed_are_listed_with_each_and_words_pick_rows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"intermediate_size": 1536}))

    def listed(*only):
        return [
            (job.row, job.share, job.seed, (job.partition or {}).get("seed"))
            for job in compare.jobs(tmp_path, Path("c"), windows=1, seeds=2, only=list(only))
        ]

    assert listed("static pruning, refit") == [
        ("dense", 100, 0, None),
        *(
            (f"static pruning, {fitted}", share, 0, None)
            for share in (50, 75, 25)
            for fitted in ("refit", "refit and fit")
        ),
    ]
    assert ("clustering", 50, 1, 1) in listed("clustering")
    assert ("LLaMA-MoE, clustering", 75, 1, 1) in listed("clustering")
    assert set(rows.methods(1536)) >= rows.SEEDED
    assert {row for row, *_ in listed()} == {"dense", *rows.plain(25), *rows.methods(1536)}


def test_bounds_and_pruning_run(project):
    for name, share in zip(rows.plain(25), itertools.cycle(rows.SHARES)):
        figures = compare.run(compare.Job(row=name, share=share, seed=0, **WHERE))
        assert set(figures["nats"]) == {"prose", "code"}, name
        assert all(0 < nats < 20 for nats in figures["nats"].values()), name
        assert len(figures["tokens_per_s"]) == (1 if name.startswith("oracle") else 2), name
        assert figures["peak_mib"] > 100


def test_a_row_of_the_stage_with_every_expert_on_is_as_good_as_the_dense_model(project):
    half = rows.methods(128)["activation, 64 experts"][50]
    every = half.model_copy(update={"calibration_windows": 2, "top_k": half.experts})
    figures = compare.run(compare.Job(row="any", share=100, seed=0, partition=every.model_dump(), **WHERE))
    dense = compare.run(compare.Job(row="dense", share=100, seed=0, **WHERE))
    assert figures["oracle_nats"] == pytest.approx(dense["nats"], rel=1e-5)
    assert figures["nats"] == pytest.approx(dense["nats"], rel=0.02)
    assert figures["identity_error"] < 1e-5
    assert len(figures["tokens_per_s"]) == 2
    assert not list(Path(".scratch/compare-row").glob("*/moe"))


def test_the_table_has_the_ratio_to_the_dense_model_the_range_of_the_seeds_and_every_domain():
    def row(name, share, seed, nats, **more):
        figures = {"nats": {"a": nats, "b": nats + 2}, "seconds": 3, "peak_mib": 700, "tokens_per_s": [1000, 500]}
        return {"row": name, "share": share, "seed": seed, **figures, **more}

    lines = list(
        compare.table(
            [
                row("dense", 100, 0, 1.0),
                row("split", 50, 0, 1.0 + math.log(2), identity_error=1e-6, oracle_nats={"a": 1.0, "b": 3.0}),
                row("split", 50, 1, 1.0 + math.log(4), identity_error=3e-6, oracle_nats={"a": 1.0, "b": 3.0}),
            ]
        )
    )
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| split")).split("|")[1:-1]]
    dense = math.exp(2)
    assert cells == [
        "split",
        "50 %",
        f"{3 * dense:.2f}",
        "3.00",
        "2.00 to 4.00 (2)",
        "1.00",
        "3.0e-06",
        "3",
        "700",
        "500",
        "0.50",
    ]
    assert lines[-1] == f"| split | 50 % | {3 * math.exp(1):.2f} | {3 * math.exp(3):.2f} |"
    assert all(line.count("|") == lines[0].count("|") for line in lines[: lines.index("")])

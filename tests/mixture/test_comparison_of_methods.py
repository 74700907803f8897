"""The control of domain weights: the small ground, the figures, and a whole comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.corpus import manifest, shards
from tasks.corpus.tokenizer import encoder
from tasks.mixture.compare import __main__ as compare
from tasks.mixture.compare import estimates, small, table
from tests.corpus import texts


@pytest.fixture
def corpus(tiny_project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny project with its model, whose vocabulary of 512 is cut to 400, and its corpus."""
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(tiny_model)
    texts.run()
    monkeypatch.setattr(small, "VOCABULARY", 400)
    return Path("data/corpora/tiny")


def text_of(corpus: Path, model: Path, domain: str, split: str) -> list[str]:
    """The documents of a split, decoded."""
    one = encoder.load_encoder(model)
    batches = [shards.open_shard(path) for path in sorted((corpus / domain / split).glob("*.arrow"))]
    return [one.decode(ids[:-1]) for batch in batches for ids in batch.column("input_ids").to_pylist()]


def test_the_cut_tokenizer_splits_the_same_text_into_its_first_merges(tiny_model: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_model / "tokenizer.json").read_text())
    cut = small.cut_tokenizer(raw, size=300)
    assert len(cut["model"]["vocab"]) == 300
    assert set(cut["model"]["vocab"]) <= set(raw["model"]["vocab"])
    pairs = [list(pair) if isinstance(pair, list) else pair.split(" ") for pair in raw["model"]["merges"]]
    assert cut["model"]["merges"] == pairs[: len(cut["model"]["merges"])]
    with pytest.raises(ValueError, match="512 tokens can be kept, and not 9999"):
        small.cut_tokenizer(raw, size=9999)
    with pytest.raises(ValueError, match="only a byte-pair encoder"):
        small.cut_tokenizer({**raw, "model": {**raw["model"], "type": "Unigram"}}, size=300)


def test_every_document_keeps_its_text_and_its_split_and_a_domain_held_out_is_test_text_alone(
    corpus: Path, tmp_path: Path
) -> None:
    parent, model, target = Path("data/models/tiny"), tmp_path / "model", tmp_path / "corpora/small"
    small.write_tokenizer(parent, model)
    small.encode_corpus(corpus, target, parent=parent, model=model, unseen=["code"])
    made = manifest.load(target)
    assert list(made.trained) == ["prose"]
    for split in manifest.SPLITS:
        assert text_of(target, model, "prose", split) == text_of(corpus, parent, "prose", split)
    every = [text for split in manifest.SPLITS for text in text_of(corpus, parent, "code", split)]
    assert text_of(target, model, "code", "test") == every
    assert made.unseen["code"].train.tokens == 0
    assert made.domains["prose"].train.tokens > manifest.load(corpus).domains["prose"].train.tokens
    assert made.domains["prose"].train.bytes == manifest.load(corpus).domains["prose"].train.bytes
    for names, message in ((["news"], "not in"), (["code", "prose"], "all domains")):
        with pytest.raises(ValueError, match=message):
            small.encode_corpus(corpus, target, parent=parent, model=model, unseen=names)


def cell(heldout: float, unseen: float) -> dict[str, Any]:
    losses = {"heldout": {"a": heldout - 1, "b": heldout + 1}, "unseen": {"c": unseen}}
    return {**losses, "tokens": 10, "final_weights": {"a": 0.5, "b": 0.5}}


def test_a_method_is_better_only_by_more_than_two_standard_errors_of_the_differences_by_seed() -> None:
    uniform = {0: cell(3.0, 4.0), 1: cell(3.5, 4.0), 2: cell(4.0, 4.0)}
    better = {0: cell(2.9, 4.1), 1: cell(3.4, 3.9), 2: cell(3.89, 4.0)}
    row = table.row("olmix", better, {"uniform": uniform})
    found = row["heldout"]["against"]["uniform"]
    assert found["mean"] == pytest.approx(-0.31 / 3)
    assert found["stderr"] == pytest.approx(0.01 / 3)  # of -0.1, -0.1, -0.11
    assert found["verdict"] == "better than uniform"
    assert row["heldout"]["stderr"] > 0.2  # the seeds differ far more than the methods
    assert row["unseen"]["against"]["uniform"]["verdict"] == "no better, no worse than uniform"
    assert row["domains"]["b"] == pytest.approx((3.9 + 4.4 + 4.89) / 3)
    worse = table.row("doge", uniform, {"uniform": better})
    assert worse["heldout"]["against"]["uniform"]["verdict"] == "worse than uniform"
    alone = table.row("doge", {0: cell(1.0, 1.0)}, {"uniform": uniform})
    assert math.isnan(alone["heldout"]["stderr"])
    assert alone["heldout"]["against"]["uniform"]["verdict"] == "one seed says nothing"


def test_an_estimate_costs_its_flops_in_tokens_of_the_training_and_methods_of_a_swarm_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []

    def stage(folder: Path, name: str) -> None:
        stages.append(name)
        cost = {"tokens": 500, "share_of_training": 0.5, "flops_share": 0.25}
        (folder / "runs" / name / "mixture.json").write_text(json.dumps({"evidence": {"cost": cost}}))

    monkeypatch.setattr(estimates, "_stage", stage)
    ground: Any = SimpleNamespace(
        folder=tmp_path,
        identity="x",
        domains=["a", "b"],
        has_parent=True,
        models={0: Path("moe")},
        params=SimpleNamespace(eval_windows=3),
        proxy={"model": "student"},
        write_settings=lambda *_, **__: None,
    )
    wanted = [estimates.Wanted(method=method, seed=0, tokens=1000) for method in ("regmix", "olmix", "doge")]
    made = estimates.run(ground, wanted, proxy_tokens=100, units=8)
    assert stages[0] == stages[1] != stages[2]
    assert len(set(made.values())) == 3
    assert estimates.cost(ground, made[wanted[0]]) == 0.25
    estimates.run(ground, wanted, proxy_tokens=100, units=8)
    assert len(stages) == 3
    target = estimates.Wanted(method="olmix", seed=0, tokens=1000, target="b")
    estimates.run(ground, [target], proxy_tokens=100, units=8)
    assert stages[3] == stages[0]  # another target fits its law to the same swarm
    settings = estimates.mixture(ground, wanted[0], proxy_tokens=100, units=8)
    assert settings["weights"] == {"a": 1.0, "b": 1.0}
    assert "weights" not in estimates.mixture(ground, wanted[2], proxy_tokens=100, units=8)
    dynamic = estimates.Wanted(method="dynamic", seed=0, tokens=1000)
    settings = estimates.mixture(ground, dynamic, proxy_tokens=1, units=1)
    assert settings == {"method": "reference_loss", "windows": 3}


def test_estimates_towards_a_target_are_told_it_and_have_its_own_text_as_a_baseline() -> None:
    ground: Any = SimpleNamespace(domains=["a", "b"], has_parent=False, proxy={"model": "scratch"})

    def made(method: str) -> dict[str, Any]:
        wanted = estimates.Wanted(method=method, seed=0, tokens=1000, target="b")
        return estimates.mixture(ground, wanted, proxy_tokens=100, units=8)

    assert made("olmix")["target"] == made("doge")["target"] == "b"
    assert "target" not in made("doremi")  # which takes none
    assert made("uniform") == {"method": "uniform"}
    assert made("target") == {"method": "explicit", "weights": {"a": 1e-6, "b": 1.0}}


def test_a_table_with_a_target_shows_it_beside_every_rival() -> None:
    def on_target(loss: float) -> dict[int, Any]:
        return {seed: {**cell(3.0, 4.0), "target": {"b": loss + seed / 100}} for seed in range(3)}

    rivals = {"uniform": on_target(4.0), "proportional": on_target(4.2), "target": on_target(3.4)}
    row = table.row("olmix", on_target(3.5), rivals)
    assert row["target"]["against"]["uniform"]["verdict"] == "better than uniform"
    assert row["target"]["against"]["target"]["verdict"] == "worse than target"
    content = {
        "what": "a model",
        "seeds": [0, 1, 2],
        "windows": 4,
        "unseen": ["c"],
        "target": "b",
        "tokens": 10,
        "equal_tokens": [table.row("uniform", rivals["uniform"], {})],
        "equal_cost": [{**row, "cost": 5, "baseline_tokens": 15}],
    }
    shown = table.markdown(content)
    assert "unseen: c; target: b." in shown
    assert "| method | held-out | - uniform | unseen | - uniform | target | - uniform | on held-out text |" in shown
    assert "| - uniform | - proportional | - target | |" in shown
    assert "| olmix | 5 | 15 | target | 3.5100 ± 0.0058 | -0.5000 ± 0.0000 | -0.7000 ± 0.0000 | +0.1000 ± " in shown


@pytest.mark.e2e
def test_a_comparison_trains_each_cell_once_at_equal_tokens_and_at_equal_cost(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "compare"
    command = [str(folder), "--corpus", str(corpus), "--methods", "uniform", "dynamic"]
    command += ["--seeds", "3", "--tokens", "2048", "--jobs", "1"]
    assert compare.main(command) == 0
    content = json.loads((folder / compare.FILE).read_text())
    assert [row["method"] for row in content["equal_tokens"]] == ["uniform", "dynamic"]
    (dearer,) = content["equal_cost"]
    assert (dearer["cost"], dearer["baseline_tokens"]) == (2048, 4096)
    trained = sorted(
        (result["method"], result["tokens"])
        for result in (json.loads(path.read_text()) for path in (folder / "cells").iterdir())
    )
    assert trained == [("dynamic", 2048), ("proportional", 4096), ("uniform", 2048), ("uniform", 4096)]
    uniform = content["equal_tokens"][0]
    assert uniform["weights"]["prose"]["mean"] == pytest.approx(0.5)
    assert uniform["heldout"]["mean"] < 1.1 * math.log(400)
    assert "| uniform | " in capsys.readouterr().out

    assert compare.main([*command, "--target", "news"]) == 1
    assert "--target news: not a domain that is trained on; those are code, prose" in capsys.readouterr().err
    made = [*(folder / "cells").iterdir(), *(folder / "estimates").iterdir()]
    before = [path.stat().st_mtime_ns for path in made]
    assert compare.main(command) == 0
    assert [path.stat().st_mtime_ns for path in made] == before
    assert json.loads((folder / compare.FILE).read_text()) == content

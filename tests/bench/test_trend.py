"""The trend over size: its settings, its text and start, what a row says, and that finished pieces are kept."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from safetensors import safe_open

from bench import healing
from bench.trend import __main__ as trend
from bench.trend import sizes, text
from tasks.corpus import shards
from tasks.settings import Settings
from tests.corpus import texts


def test_every_split_and_child_has_the_share_that_it_is_named_by_and_the_demos_healing(tmp_path):
    demo = Settings.model_validate(YAML(typ="safe", pure=True).load(Path("pipelines.yaml").read_text())).pipelines[
        "demo"
    ]
    made = Settings.model_validate(
        sizes.settings(tmp_path, sizes.SIZES, heldout={"prose": 0.2, "code": 0.2})
    ).pipelines
    assert set(made) == {
        key for name in sizes.SIZES for key in (f"dense-{name}", *(f"{name}-{share}" for share in (25, 50, 75)))
    }
    for name, size in sizes.SIZES.items():
        assert made[f"dense-{name}"].pretrain.tokens == size.tokens
        for share in sizes.SHARES:
            cut = made[f"{name}-{share}"]
            partition, pretrain = cut.partition, cut.pretrain
            assert (partition.top_k + partition.shared_experts) * partition.expert_size * 100 == share * size.ffn
            assert partition.expert_size % 8 == 0
            assert cut.child is not None
            assert (pretrain.tokens, pretrain.step_tokens) == (demo.pretrain.tokens, demo.pretrain.step_tokens)
            for field in ("learning_rate", "learning_rates", "warmup_tokens", "balance"):
                assert getattr(pretrain, field) == getattr(demo.pretrain, field)
            for field in ("method", "experts", "shared_experts", "top_k", "down_proj", "fit_passes"):
                assert getattr(partition, field) == getattr(demo.partition, field)


def test_the_body_of_a_size_is_what_its_start_holds_beside_embedding_and_norms(tmp_path, tiny_model):
    size = sizes.SIZES["300k"]
    sizes.start(size, tmp_path / "start", tokenizer=tiny_model)
    with safe_open(tmp_path / "start/model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert sum(math.prod(shape) for name, shape in shapes.items() if "_proj" in name) == size.body
    assert [name for name, shape in shapes.items() if "_proj" not in name and len(shape) > 1] == [
        "model.embed_tokens.weight"
    ]


def test_the_text_is_that_of_the_corpus_and_the_same_documents_are_held_out(tiny_project, tiny_model):
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(tiny_model)
    texts.run()
    text.write(texts.CORPUS, Path("text"), tokenizer=tiny_model, vocabulary=300, characters=5000)
    assert len(json.loads(Path("text/tokenizer/tokenizer.json").read_text())["model"]["vocab"]) == 300
    first = _documents(texts.CORPUS)

    settings = YAML(typ="safe", pure=True).load(Path("pipelines.yaml").read_text())
    for name, share in text.heldout(texts.CORPUS).items():
        source = {"source": f"dir:{Path('text').resolve()}/{name}.jsonl", "format": "jsonl", "heldout": share}
        settings["corpora"]["tiny"]["domains"][name] |= source
    with Path("pipelines.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(settings, file)
    texts.run()
    assert _documents(texts.CORPUS) == first


def _documents(corpus):
    """Ids of the documents of each domain and split."""
    return {
        f"{path.parts[-3]}/{path.parts[-2]}": sorted(map(bytes, shards.doc_ids(shards.open_shard(path))))
        for path in corpus.glob("*/*/*.arrow")
        if path.parts[-3] != "verdicts"
    }


def test_a_row_pairs_windows_within_domains_and_says_what_part_of_the_childs_loss_the_split_saves():
    tokens = sizes.SEQ_LEN - 1
    nats = {
        "parent": {"prose": [1 * tokens, 1 * tokens], "code": [2 * tokens, 2 * tokens]},
        "split": {"prose": [2 * tokens, 4 * tokens], "code": [3 * tokens, 3 * tokens]},
        "child": {"prose": [3 * tokens, 6 * tokens], "code": [3.5 * tokens, 3.5 * tokens]},
    }
    row = trend.row(nats, "split", "child")
    assert row["parent"] == pytest.approx(1.5)
    assert row["split"] == pytest.approx(3)
    assert row["child"] == pytest.approx(4)
    assert row["below"] == pytest.approx(1)
    assert row["part"] == pytest.approx(1 / 2.5)
    assert row["stderr"] == pytest.approx(math.sqrt(0.5 / 2) / 2)  # prose: 1 and 2; code: no variance


def test_the_slope_is_per_ten_times_the_size_and_exact_rows_weigh_most():
    rows = [{"below": 0.1, "stderr": 0.01, "part": 0.3}, {"below": 0.2, "stderr": 0.01, "part": 0.3}]
    rows.append({"below": 0.9, "stderr": 100.0, "part": 0.3})
    slope, stderr = trend.slope([10**5, 10**6, 10**7], rows, "below")
    assert slope == pytest.approx(0.1, abs=1e-4)
    assert stderr == pytest.approx(0.01 * math.sqrt(2), rel=1e-3)


def test_finished_pieces_are_kept(tmp_path, monkeypatch):
    ran = []
    results = {"mixture": ["mixture.json"], "pretrain": ["trained/x", "pretrain.json"]}

    def stage(name, key, *, folder):
        ran.append((name, key))
        if (name, key) == ("control", "1m-50") and ran.count((name, key)) == 1:
            raise SystemExit("killed")
        for result in results.get(name, [f"{name}.json"]):
            path = folder / "runs" / key / result
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"tokens": size.trained}))

    size = sizes.Size(hidden=32, ffn=64, layers=1, tokens=2049)
    monkeypatch.setattr(healing, "stage", stage)
    start = tmp_path / "data/models/start-1m"
    start.mkdir(parents=True)
    (start / "config.json").write_text("{}")
    for _ in range(2):
        trend.train(tmp_path, "1m", size)
    with pytest.raises(SystemExit, match=r"pretrain.json: tokens = 4096, asked for are 6144; name another FOLDER"):
        trend.train(tmp_path, "1m", replace(size, tokens=6144))
    with pytest.raises(SystemExit):
        trend.cut(tmp_path, "1m-50")
    for key in ("1m-50", "1m-50", "1m-25"):
        trend.cut(tmp_path, key)
    assert ran == [
        ("mixture", "dense-1m"),
        ("pretrain", "dense-1m"),
        ("mixture", "1m-50"),
        ("partition", "1m-50"),
        ("pretrain", "1m-50"),
        ("control", "1m-50"),
        ("control", "1m-50"),
        ("partition", "1m-25"),
        ("pretrain", "1m-25"),
        ("control", "1m-25"),
    ]
    assert (tmp_path / "data/models/dense-1m/x").exists()

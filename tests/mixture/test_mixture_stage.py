from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks import settings
from tasks.corpus import manifest
from tasks.corpus.sampling import windows
from tasks.mixture.__main__ import main, run
from tests.corpus import texts


@pytest.fixture
def corpus(tiny_project: Path, tiny_model: Path) -> Path:
    """The tiny project with its model and its corpus; returns the corpus's folder."""
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(tiny_model)
    texts.run()
    return Path("data/corpora/tiny")


def test_reference_losses_are_those_of_a_plain_forward_pass_and_the_baselines_stand_beside_them(corpus: Path) -> None:
    run("tiny")
    written = json.loads(Path("runs/tiny/mixture.json").read_text())
    assert written["method"] == "reference_loss"
    assert written["weights"] == {"prose": 0.5, "code": 0.5}
    evidence = written["evidence"]

    model = AutoModelForCausalLM.from_pretrained("data/models/tiny").eval()
    for domain, ids_BL in windows.validation(corpus, seq_len=64, count=4).items():
        ids = torch.from_numpy(ids_BL)
        with torch.no_grad():
            nats = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
        assert evidence["window_losses"][domain] == pytest.approx(nats, rel=1e-5)
        assert evidence["reference_losses"][domain] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
        assert evidence["reference_losses"][domain] < math.log(512)

    tokens = {name: domain.train.tokens for name, domain in manifest.load(corpus).domains.items()}
    assert evidence["tokens"] == tokens
    assert evidence["uniform"] == {"prose": 0.5, "code": 0.5}
    assert evidence["proportional"]["code"] == pytest.approx(tokens["code"] / sum(tokens.values()))
    budget = settings.load().pipeline("tiny").pretrain.tokens
    assert evidence["epochs"]["code"] == pytest.approx(0.5 * budget / tokens["code"])
    assert evidence["capped"] == {}
    share = repr(evidence["proportional"]["code"])
    rows = Path("runs/tiny/mixture.csv").read_text().splitlines()
    assert rows[0] == "domain,weight,spread,uniform,proportional"
    assert f"code,0.5,,0.5,{share}" in rows[1:]


def test_the_test_part_may_be_missing_and_neither_it_nor_a_window_may_be_too_short_for_the_evaluation(
    corpus: Path,
) -> None:
    first = run("tiny").read_bytes()
    for split in corpus.glob("*/test"):
        shutil.rmtree(split)  # only tasks/evaluate may open it
    assert run("tiny").read_bytes() == first
    assert json.loads(Path("runs/tiny/mixture.time.json").read_text()).keys() == {"seconds"}

    # What only the evaluation will ask for is looked at here, before anything is trained.
    path = corpus / "manifest.json"
    contents = json.loads(path.read_text())
    contents["domains"]["code"]["test"]["tokens"] = 63
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="the test part of code is shorter than one window of 64 tokens"):
        run("tiny")
    file = Path("pipelines.yaml")
    file.write_text(file.read_text().replace("evaluate: {seq_len: 64,", "evaluate: {seq_len: 257,"))
    with pytest.raises(
        ValueError,
        match=r"evaluate.seq_len = 257: tiny has max_position_embeddings = 256 \(data/models/tiny/config.json\)",
    ):
        run("tiny")


def test_without_a_corpus_the_error_is_one_line(
    tiny_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixture", "tiny"])
    assert main() == 1
    said = capsys.readouterr().err
    assert said.startswith("mixture: ")
    assert "Traceback" not in said

"""The stage as a person runs it: what it writes, that it writes the same again, and that a failure writes nothing."""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tasks import scratch
from tasks.corpus import fingerprint
from tasks.corpus.prepare import stage as corpus
from tasks.evaluate import __main__ as evaluate
from tasks.mixture import __main__ as mixture
from tasks.moe import dense
from tasks.partition import __main__ as stage
from tasks.partition import convert, index
from tasks.pretrain import __main__ as pretrain
from tasks.tools import verify_partition as verify
from tests import warm_processes

RUN = Path("runs/tiny")
SETTINGS = "{method: activation, experts: 12, shared_experts: 4, top_k: 4, calibration_windows: 16}"


def die_at_the_end():
    """The stage, killed where it would publish its result; in a process of its own."""
    scratch.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    stage.run("tiny")


@pytest.fixture(autouse=True)
def _float32():
    """The stage multiplies as this machine does, in this process as in others."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("made") / "data"


@pytest.fixture
def prepared(tiny_project, data, monkeypatch):
    """The tiny project with its model and corpus, which the first test makes for all."""
    monkeypatch.setattr(sys, "argv", ["stage", "tiny"])
    if not data.exists():
        assert dense.main() == fingerprint.main() == 0
        corpus.make("tiny")
        shutil.copytree("data", data)
    shutil.copytree(data, "data", dirs_exist_ok=True)
    return tiny_project


def _digests(folder=RUN):
    files = [folder / "partition.safetensors", *sorted((folder / "moe").glob("*"))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _edit(old, new):
    text = Path("pipelines.yaml").read_text()
    assert old in text
    Path("pipelines.yaml").write_text(text.replace(old, new))


def test_the_stage_writes_a_checkpoint_that_verifies(prepared, capsys):
    assert stage.main() == 0
    metrics = json.loads((RUN / "partition.json").read_text())
    assert metrics["identity_error"] <= 1e-5
    assert set(metrics["validation_loss"]) == set(metrics["dense"]["validation_loss"]) == {"prose", "code"}
    assert metrics["perplexity"] > metrics["dense"]["perplexity"]
    assert metrics["ffn_active"] == 0.5
    assert f"{metrics['perplexity']:.2f}" in capsys.readouterr().out
    assert verify.verify_checkpoint(RUN / "moe", RUN / "partition.safetensors", Path("data/models/tiny")) == []
    made = index.read(RUN / "partition.safetensors")
    assert len(made.meta["calibration"]) == 16
    assert made.meta["method"] == "activation"


def test_the_random_method_makes_a_mixtral_and_needs_no_calibration(prepared):
    _edit(SETTINGS, "{method: random, experts: 8, top_k: 2, scale: paper, seed: 3}")
    assert stage.main() == 0
    assert json.loads((RUN / "moe/config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert index.read(RUN / "partition.safetensors").meta["calibration"] == []


def test_experts_that_do_not_divide_the_ffn_end_with_the_numbers_that_do(prepared, capsys):
    _edit("experts: 12, shared_experts: 4", "experts: 12, shared_experts: 5")
    assert stage.main() == 1
    assert (
        "17 does not divide the FFN width 128 (intermediate_size); totals that do: 2, 4, 8, 16"
        in capsys.readouterr().err
    )
    assert not RUN.exists()


def test_a_shape_that_an_engine_cannot_load_writes_nothing_and_the_engines_shape_no_byte(prepared, capsys):
    random = "{method: random, experts: 8, top_k: 2, layers: alternate"
    _edit(SETTINGS, random + "}")
    assert stage.main() == 1
    said = capsys.readouterr().err
    assert "llama.cpp cannot run the qwen2_moe: 1 of 2 layers are dense; make all sparse" in said
    assert "set engines: [vllm, transformers]" in said
    assert not RUN.exists()
    written = []
    for engines in ("[vllm, transformers]", "[]"):
        _edit(random, random := random.partition(", engines")[0] + f", engines: {engines}")
        assert stage.main() == 0
        written.append(_digests())
    assert written[0] == written[1]
    assert "vllm will be slow: 16 neurons" in capsys.readouterr().err


def test_a_conversion_that_fails_the_identity_test_writes_nothing(prepared, monkeypatch, capsys):
    """The up rows of the experts lose their order."""
    slices = convert.slices

    def harmed(gate_ND, up_ND, *arguments, **options):
        return slices(gate_ND, up_ND.flip(0), *arguments, **options)

    monkeypatch.setattr(convert, "slices", harmed)
    assert stage.main() == 1
    assert "identity test: with all experts on" in capsys.readouterr().err
    assert not RUN.exists()


def test_kill_9_leaves_the_last_result_and_every_process_writes_the_same_bytes(prepared):
    stage.run("tiny")
    before = _digests()
    killed = warm_processes.run(die_at_the_end)
    assert killed.returncode == -signal.SIGKILL
    assert _digests() == before
    (work,) = Path(".scratch/partition-tiny").glob("*/")
    assert _digests(work) == before
    shutil.rmtree(RUN)
    for split in Path("data/corpora/tiny").glob("*/test"):
        shutil.rmtree(split)  # only tasks/evaluate may open it
    stage.run("tiny")
    assert _digests() == before


@pytest.mark.e2e
def test_a_model_of_which_every_other_layer_is_sparse_trains_with_tanh_gates_and_is_judged(prepared):
    _edit(
        SETTINGS, SETTINGS.replace("}", ", engines: [transformers], layers: alternate, down_proj: refit, gate: tanh}")
    )
    for each in (mixture, stage, pretrain):
        each.run("tiny")
    evaluate.evaluate("tiny")
    config = json.loads((RUN / "trained/config.json").read_text())
    assert (config["model_type"], config["mlp_only_layers"]) == ("qwen2_moe", [0])
    assert list(json.loads((RUN / "partition.json").read_text())["layer_error"]) == ["1"]
    assert json.loads((RUN / "pretrain.json").read_text())["gate_fit"]["mean"]["agreement"] > 0.8
    loads = json.loads((RUN / "routing.json").read_text())["trained"]
    assert {len(load) for load in loads.values()} == {1}  # sparse layers
    assert json.loads((RUN / "evaluation.json").read_text())["routing"]["trained"]["worst"]["layer"] == 1

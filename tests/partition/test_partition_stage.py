"""The stage as a person runs it: what it writes, that it writes the same again, and that a failure writes nothing."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.partition import index
from tasks.tools import verify_partition as verify

RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made") / "data"


@pytest.fixture
def prepared(tiny_project, made):
    """The tiny project with its model and corpus, which the first test makes for all."""
    if not made.exists():
        for stage in ("tasks.moe.dense", "tasks.corpus.fingerprint", "tasks.corpus"):
            subprocess.run([sys.executable, "-m", stage, "tiny"], check=True)
        shutil.copytree("data", made)
    shutil.copytree(made, "data", dirs_exist_ok=True)
    return tiny_project


def _partition(**options):
    return subprocess.run(
        [sys.executable, "-m", "tasks.partition", "tiny"], capture_output=True, text=True, check=False, **options
    )


def _digests():
    files = [RUN / "partition.safetensors", *sorted((RUN / "moe").glob("*"))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _edit(old, new):
    text = Path("pipelines.yaml").read_text()
    assert old in text
    Path("pipelines.yaml").write_text(text.replace(old, new))


def test_the_stage_writes_a_checkpoint_that_verifies(prepared):
    done = _partition()
    assert done.returncode == 0, done.stderr
    metrics = json.loads((RUN / "partition.json").read_text())
    assert metrics["identity_error"] <= 1e-5
    assert set(metrics["validation_loss"]) == set(metrics["dense"]["validation_loss"]) == {"prose", "code"}
    assert metrics["perplexity"] > metrics["dense"]["perplexity"]
    assert metrics["ffn_active"] == 0.5
    assert f"{metrics['perplexity']:.2f}" in done.stdout
    assert verify.verify_checkpoint(RUN / "moe", RUN / "partition.safetensors", Path("data/models/tiny")) == []
    made = index.read(RUN / "partition.safetensors")
    assert len(made.meta["calibration"]) == 16
    assert made.meta["method"] == "activation"


def test_the_random_method_makes_a_mixtral_and_needs_no_calibration(prepared):
    _edit(
        "{method: activation, experts: 12, shared_experts: 4, top_k: 4, calibration_windows: 16}",
        "{method: random, experts: 8, top_k: 2, scale: paper, seed: 3}",
    )
    done = _partition()
    assert done.returncode == 0, done.stderr
    assert json.loads((RUN / "moe/config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert index.read(RUN / "partition.safetensors").meta["calibration"] == []


def test_experts_that_do_not_divide_the_ffn_end_with_the_numbers_that_do(prepared):
    _edit("experts: 12, shared_experts: 4", "experts: 12, shared_experts: 5")
    done = _partition()
    assert done.returncode == 1
    assert "12 + 5 = 17 does not divide the FFN width 128; totals that do: 2, 4, 8, 16" in done.stderr
    assert "Traceback" not in done.stderr
    assert not RUN.exists()


def test_a_conversion_that_fails_the_identity_test_writes_nothing(prepared):
    """The harm is done to the code, as a mistake would do it: up rows of the last expert lose their order."""
    file = Path("tasks/partition/convert.py")
    good = "up_EFD=up_ND[routed_P]"
    assert good in file.read_text()
    file.write_text(file.read_text().replace(good, "up_EFD=up_ND[routed_P.flip(0)]"))
    done = _partition()
    assert done.returncode == 1
    assert "identity test: with all experts on" in done.stderr
    assert not RUN.exists()


def test_kill_9_leaves_the_last_result_and_the_next_run_writes_the_same_bytes(prepared):
    assert _partition().returncode == 0
    before = _digests()
    process = subprocess.Popen([sys.executable, "-m", "tasks.partition", "tiny"], stderr=subprocess.DEVNULL)
    while not list(Path(".scratch/partition-tiny").glob("*/partition.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _digests() == before
    shutil.rmtree(RUN)
    for split in Path("data/corpora/tiny").glob("*/test"):
        shutil.rmtree(split)  # only tasks/evaluate may open it
    assert _partition().returncode == 0
    assert _digests() == before


@pytest.mark.e2e
def test_a_model_of_which_every_other_layer_is_sparse_trains_with_tanh_gates_and_is_judged(prepared):
    _edit(
        "{method: activation, experts: 12, shared_experts: 4, top_k: 4, calibration_windows: 16}",
        "{method: activation, experts: 12, shared_experts: 4, top_k: 4, calibration_windows: 16, layers: alternate, "
        "down_proj: refit, gate: tanh}",
    )
    for stage in ("tasks.mixture", "tasks.partition", "tasks.pretrain", "tasks.evaluate"):
        done = subprocess.run([sys.executable, "-m", stage, "tiny"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    config = json.loads((RUN / "trained/config.json").read_text())
    assert (config["model_type"], config["mlp_only_layers"]) == ("qwen2_moe", [0])
    assert list(json.loads((RUN / "partition.json").read_text())["layer_error"]) == ["1"]
    assert json.loads((RUN / "pretrain.json").read_text())["gate_fit"]["mean"]["agreement"] > 0.8
    loads = json.loads((RUN / "routing.json").read_text())["trained"]
    assert {len(load) for load in loads.values()} == {1}  # sparse layers
    assert json.loads((RUN / "evaluation.json").read_text())["routing"]["trained"]["worst"]["layer"] == 1

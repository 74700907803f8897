"""The pruned baseline against transformers itself: the parent with the other neurons masked, for every dense class."""

import json

import numpy as np
import pytest
import torch
from dense_models import sample, stored
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench.partition import baselines
from tasks import architectures, settings
from tasks.moe.streamed import Streamed
from tasks.partition import calibration, identity, pruned
from tests import models

WIDTH, ACTIVE = 48, 24
SPLIT = {"method": "random", "experts": 8, "top_k": 4, "calibration_windows": 6}
REFIT = SPLIT | {"down_proj": "refit", "fit_passes": 2}
PARENTS = {
    "llama": {},
    "llama, tied, llama3 rope": {"tie_word_embeddings": True, "rope_parameters": models.LLAMA3},
    "llama, biases, wide heads": {"attention_bias": True, "head_dim": 12},
    "mistral, window": {"sliding_window": 16},
    "qwen2": {},
    "qwen2, sliding": models.SLIDING,
    "qwen3": {"head_dim": 8},
    "granite": models.GRANITE,
}


@pytest.fixture(autouse=True)
def text(monkeypatch):
    """Random tokens instead of a corpus and of the identity test's text: the tiny models have no tokenizer."""
    monkeypatch.setattr(calibration, "draw", lambda *_, **__: (sample(), [("prose", 0)]))
    monkeypatch.setattr(identity, "sample_ids", lambda _: sample((2, 40), seed=1))


def parent(folder, kind="llama"):
    return stored(folder, models.build(kind, **{"max_position_embeddings": 128} | PARENTS[kind]))


def make(folder, dense, **options):
    """The folder, and what `cut` returns."""
    target, told = folder / "pruned", []
    partition = settings.Partition(**options)
    count = settings.Control().config(dense.config.to_dict(), partition)["intermediate_size"]
    made = pruned.cut(dense.folder, folder, partition, count=count, seq_len=40, folder=target, report=told.append)
    assert len(told) == dense.layers
    return target, made


def masked(dense):
    """The parent as transformers runs it, with all but the most energetic neurons of each layer masked."""
    model = AutoModelForCausalLM.from_pretrained(dense.folder, dtype=torch.float32).eval()
    kept = []
    for block in model.model.layers:
        got = []
        hooks = [
            block.mlp.down_proj.register_forward_pre_hook(lambda _, args, got=got: got.append(args[0])),
            block.post_attention_layernorm.register_forward_pre_hook(lambda _, args, got=got: got.append(args[0])),
        ]
        with torch.no_grad():
            model(input_ids=torch.from_numpy(sample()))
        for hook in hooks:
            hook.remove()
        residual, h = (part.flatten(0, 1).double() for part in got)
        residual = residual / getattr(model.config, "residual_multiplier", 1.0)
        down = block.mlp.down_proj.weight.detach().double()
        size = residual.square().sum(1) + (h @ down.T).square().sum(1)
        energy = (h.square() / size[:, None]).sum(0) * down.square().sum(0)
        kept.append(energy.argsort(descending=True)[:ACTIVE].sort().values)
        mask = torch.zeros(WIDTH).index_fill(0, kept[-1], 1.0)
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
    return model, kept


def test_every_dense_class_is_among_the_parents():
    assert {kind.partition(",")[0] for kind in PARENTS} == set(architectures.DENSE)


@pytest.mark.parametrize("kind", PARENTS)
def test_without_refit_the_pruned_model_is_the_parent_with_all_but_its_most_energetic_neurons_masked(tmp_path, kind):
    dense = parent(tmp_path / "dense", kind)
    folder, made = make(tmp_path, dense, **SPLIT)
    model, kept = masked(dense)
    child = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(child) is type(model)
    assert child.config.intermediate_size == ACTIVE == made["ffn_width"]
    changed = {"intermediate_size", "_name_or_path"}
    own, before = child.config.to_dict(), model.config.to_dict()
    assert {name: own[name] for name in own if name not in changed} == {
        name: before[name] for name in before if name not in changed
    }
    ids = torch.from_numpy(sample((3, 60), seed=2))
    with torch.no_grad():
        given, wanted = child(input_ids=ids).logits, model(input_ids=ids).logits
    assert ((given - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5
    assert made["identity_error"] <= 1e-5
    weights, theirs = load_file(folder / "model.safetensors"), load_file(dense.folder / "model.safetensors")
    assert weights.keys() == theirs.keys()
    for name, tensor in weights.items():
        expected = theirs[name]
        if ".mlp." in name:
            places = kept[int(name.split(".")[2])]
            expected = expected[:, places] if "down_proj" in name else expected[places]
        assert torch.equal(tensor, expected), name


def test_with_refit_and_fit_the_pruned_model_is_the_static_row_of_the_benchmark(tmp_path):
    dense = parent(tmp_path / "dense")
    folder, made = make(tmp_path, dense, **REFIT)
    validation = {"text": sample((3, 40), seed=4)}
    build = baselines.static(ACTIVE / WIDTH, refit=True, fit_passes=2)
    expected = baselines.measure(dense, validation, build, calibration=sample()).nats["text"]
    nats_B = Streamed(folder).nll(validation["text"], batch=4)
    assert nats_B.mean() / 39 == pytest.approx(expected, rel=1e-5)
    plain, _ = masked(dense)
    with torch.no_grad():
        ids = torch.from_numpy(validation["text"])
        assert plain(input_ids=ids, labels=ids).loss.item() != pytest.approx(expected, rel=1e-3)
    assert made["identity_error"] <= 1e-5
    assert made["layer_error"].keys() == {"0", "1"}


@pytest.mark.parametrize("refit", [{}, {"down_proj": "refit"}])
def test_the_pruned_model_of_a_bfloat16_parent_is_stored_and_proved_as_one(tmp_path, refit):
    dense = stored(tmp_path / "dense", models.build("llama", dtype=torch.bfloat16, max_position_embeddings=128))
    folder, made = make(tmp_path, dense, **SPLIT, **refit)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert made["identity_error"] <= 1e-5


@pytest.mark.parametrize("refit", [{}, {"down_proj": "refit"}])
def test_a_pruned_model_with_one_other_neuron_is_refused_by_its_proof(tmp_path, refit):
    dense = parent(tmp_path / "dense")
    folder, _ = make(tmp_path, dense, **SPLIT, **refit)
    weights = load_file(folder / "model.safetensors")
    kept = {}
    for i in range(2):
        theirs = dense.tensor(f"model.layers.{i}.mlp.gate_proj.weight")
        mine = weights[f"model.layers.{i}.mlp.gate_proj.weight"]
        kept[i] = np.array([(theirs == row).all(1).nonzero().item() for row in mine])
    assert pruned.prove(Streamed(folder), dense, kept, parent_weights=not refit) <= 1e-5
    if refit:
        name = "model.layers.1.self_attn.o_proj.weight"
        weights[name] = weights[name] * 1.01
    else:
        weights["model.layers.1.mlp.up_proj.weight"][3] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(identity.IdentityError, match=r"pruned model: its logits differ .* allowed: 1e-05"):
        pruned.prove(Streamed(folder), dense, kept, parent_weights=not refit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "random", "layers": "alternate", "target": "qwen2_moe"},
            r"partition.layers = 'alternate' keeps layers .* set partition.layers: all, or control: none",
        ),
        (
            {"method": "copy", "experts": 4, "top_k": 2},
            r"method `copy` has 96 active neurons a layer and the FFN 48, .* set control: none",
        ),
        (
            {"method": "random", "top_k": 8},
            r"method `random` has 48 active neurons a layer and the FFN 48, .* set control: none",
        ),
    ],
)
def test_what_has_no_pruned_baseline_is_refused_with_the_reason_and_a_fix(tmp_path, options, message):
    dense = parent(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"pruned: {message}"):
        make(tmp_path, dense, **SPLIT | options)
    assert not (tmp_path / "pruned").exists()


def test_a_tensor_that_the_class_does_not_know_is_refused_by_name(tmp_path):
    dense = parent(tmp_path / "dense")
    weights = load_file(dense.folder / "model.safetensors") | {"model.layers.0.extra": torch.zeros(1)}
    save_file(weights, dense.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"dense does not hold the tensors of its config: .*model\.layers\.0\.extra"):
        make(tmp_path, Streamed(dense.folder), **SPLIT)

"""The whole construction, from one checkpoint folder to another, on tiny models of several families."""

import json

import numpy as np
import pytest
import torch
from dense_models import dense_model, sample, stored
from transformers import AutoTokenizer

from tasks import settings
from tasks.moe import checkpoint, gate
from tasks.moe.streamed import Streamed
from tasks.partition import calibration, construct, identity, index
from tasks.tools import verify_partition as verify
from tests import models
from tests.conftest import documents

ACTIVATION = {"method": "activation", "experts": 6, "shared_experts": 2, "top_k": 2, "calibration_windows": 6}


@pytest.fixture(autouse=True)
def text(monkeypatch, tmp_path):
    """Random tokens instead of a corpus and of the identity test's text: the tiny models have no tokenizer."""
    monkeypatch.setattr(calibration, "draw", lambda *_, **__: (sample(), [("prose", 0)]))
    monkeypatch.setattr(identity, "sample_ids", lambda _: sample((2, 40), seed=1))


def make(folder, dense, *, corpus="absent", **options):
    """Construct beside the dense folder; (report, index, the checkpoint's folder)."""
    target = folder / f"made-{len(list(folder.iterdir()))}"
    target.mkdir()
    told = []
    report = construct.construct(
        dense, folder / corpus, settings.Partition(**options), seq_len=40, folder=target, report=told.append
    )
    made = index.read(target / "partition.safetensors")
    assert len(told) == len(made.layers)
    return report, made, target / "moe"


@pytest.fixture
def dense(tmp_path):
    return stored(tmp_path / "dense", dense_model()).folder


def test_the_error_reported_of_a_layer_is_that_of_the_written_checkpoint(tmp_path):
    folder = stored(tmp_path / "dense", dense_model(layers=1)).folder
    report, _, moe = make(tmp_path, folder, **ACTIVATION, router_std=0.5)
    parent, child = Streamed(folder), Streamed(moe)
    states = calibration.States(parent, sample())
    block, sparse = parent.block(0), child.block(0)
    with torch.no_grad():
        x_TD = states.attend(block, 0)
        wanted = block.mlp(x_TD)
        given = (sparse.block_sparse_moe(x_TD[None]) + sparse.shared_mlp(x_TD[None]))[0]
    error = ((wanted - given).square().sum() / wanted.square().sum()).item()
    assert error == pytest.approx(report["layer_error"]["0"], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "random"},
        {"method": "random", "router": "centroid", "gate": "tanh"},
        {"method": "random", "gate": "tanh"},
        {"method": "clustering", "router_std": 3.0},
        {"method": "copy", "experts": 3, "top_k": 3},
        {"method": "random", "router": "regression", "down_proj": "refit", "fit_passes": 2, "calibration_windows": 6},
        ACTIVATION | {"experts": 6, "top_k": 6, "down_proj": "refit", "fit_passes": 2, "gate": "tanh"},
    ],
)
def test_with_all_experts_chosen_the_checkpoint_as_it_loads_is_the_dense_model(tmp_path, dense, options):
    report, _, moe = make(tmp_path, dense, **{"experts": 8, "top_k": 8} | options)
    ids = torch.from_numpy(sample())
    loaded = [checkpoint.load(folder) for folder in (moe, dense)]  # grouped_mm refuses experts of 6 neurons
    with torch.no_grad():
        sparse, parent = (model(input_ids=ids).logits for model in loaded)
    assert ((sparse - parent).abs().max() / parent.abs().max()).item() <= 1e-5
    assert report["identity_error_as_written"] <= 1e-5
    assert verify.verify_checkpoint(moe, moe.parent / "partition.safetensors", dense) == []


@pytest.mark.parametrize("fitted", [{}, {"down_proj": "refit", "fit_passes": 1}])
def test_a_layer_that_makes_massive_activations_gets_a_router_of_the_size_that_it_has_without(tmp_path, fitted):
    """The FFN answers to one token in 64 with thousands of times what it gives for the others."""
    sizes, ids = {}, torch.from_numpy(sample())
    for size in (0.0, 10.0):
        model = dense_model(layers=1)
        with torch.no_grad():
            layer = model.model.layers[0]
            model.model.embed_tokens.weight[:, 0] = 0
            model.model.embed_tokens.weight[3, 0] = 5
            layer.self_attn.o_proj.weight[0] = 0
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[:, 0] = 0
                part.weight[:40, 0] = size * torch.linspace(0.5, 1.5, 40)  # more neurons than shared experts can hold
        folder = stored(tmp_path / f"dense-{size}", model).folder
        _, _, moe = make(tmp_path, folder, **ACTIVATION, **fitted, router_std=0.02)
        parent = Streamed(folder)
        with torch.no_grad():
            x_TD = calibration.States(parent, sample()).attend(block := parent.block(0), 0)
            output_T = block.mlp(x_TD).norm(dim=1)
            logits_TE = x_TD @ Streamed(moe).tensor("model.layers.0.block_sparse_moe.router.layer.weight").T
        ordinary = ids.flatten() != 3
        sizes[size] = logits_TE[ordinary].std(1).mean().item()
        assert (output_T[~ordinary].min() > 100 * output_T[ordinary].median()) == bool(size)
    assert sizes[10.0] > 0.8 * sizes[0.0]


def test_a_method_that_needs_no_text_needs_no_corpus(tmp_path, dense):
    report, made, moe = make(tmp_path, dense, method="random", experts=8, top_k=2, router="centroid")
    assert report["identity_error"] <= 1e-5
    assert report["layer_error"] == {}
    assert made.meta["calibration"] == []
    assert verify.verify_checkpoint(moe, moe.parent / "partition.safetensors", dense) == []


def test_a_router_without_text_has_the_spread_asked_for_on_normed_inputs(tmp_path, dense):
    _, _, moe = make(tmp_path, dense, method="random", experts=48, top_k=2, router_std=0.3)
    router = Streamed(moe).tensor("model.layers.1.block_sparse_moe.gate.weight")
    x = torch.nn.functional.rms_norm(torch.randn(4000, 32), (32,))
    assert (x @ router.T).std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("top_k", [2, 4])
def test_copies_are_chosen_whole_and_compute_what_the_dense_model_does(tmp_path, dense, top_k):
    """Function preserved at the start (arXiv 2410.07524, section 4.2), with any number of whole copies."""
    _, _, moe = make(tmp_path, dense, method="copy", experts=6, top_k=top_k, expert_size=24)
    ids = torch.from_numpy(sample())
    with torch.no_grad():
        expected = checkpoint.load(dense)(input_ids=ids).logits
        torch.testing.assert_close(checkpoint.load(moe)(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"reinitialise": 0.5}])
def test_perturbed_16_bit_copies_verify(tmp_path, options):
    folder = stored(tmp_path / "dense", dense_model().to(torch.bfloat16)).folder
    _, _, moe = make(tmp_path, folder, method="copy", experts=3, top_k=3, scale="variance", **options)
    assert verify.verify_checkpoint(moe, moe.parent / "partition.safetensors", folder) == []


def test_layers_that_stay_dense_hand_the_text_on(tmp_path):
    """Layer 1 of 3 stays as it is: the errors of layer 2 are those on what layers 0 (sparse) and 1 (dense) give."""
    folder = stored(tmp_path / "dense", dense_model(layers=3)).folder
    report, made, moe = make(tmp_path, folder, **ACTIVATION, layers=[0, 2])
    assert list(made.layers) == [0, 2] == [int(i) for i in report["layer_error"]]
    assert json.loads((moe / "config.json").read_text())["mlp_only_layers"] == [1]
    child = Streamed(moe)
    with torch.no_grad():
        parent_block, hidden = Streamed(folder).block(2), child.embed(torch.from_numpy(sample()))
        for i in range(2):
            hidden = child.block(i)(hidden, **child.attention(i, 40))
        where, block = child.attention(2, 40), child.block(2)
        hidden = hidden + block.self_attn(hidden_states=block.input_layernorm(hidden), **where)[0]
        x = block.post_attention_layernorm(hidden)
        wanted, given = parent_block.mlp(x), block.mlp(x)
    error = ((wanted - given).square().sum() / wanted.square().sum()).item()
    assert error == pytest.approx(report["layer_error"]["2"], rel=1e-3)


@pytest.mark.parametrize(("family", "target"), [("llama", "granitemoeshared"), ("qwen2", "qwen2_moe")])
def test_other_families_are_fitted_and_verify(tmp_path, family, target):
    parent = stored(tmp_path / "dense", models.build(family, varied=False))
    report, _, moe = make(
        tmp_path, parent.folder, **ACTIVATION, target=target, down_proj="refit", fit_passes=1, scale="calibrated"
    )
    assert json.loads((moe / "config.json").read_text())["model_type"] == target
    assert report["identity_error"] <= 1e-5
    assert verify.verify_checkpoint(moe, moe.parent / "partition.safetensors", parent.folder) == []


@pytest.mark.parametrize("router", ["regression", "random"])
def test_tanh_gates_stand_beside_a_checkpoint_whose_routers_choose_alike(tmp_path, dense, router):
    report, _, moe = make(tmp_path, dense, **ACTIVATION, gate="tanh", router=router)
    gates = gate.read(moe)
    assert list(gates) == [0, 1]
    x = torch.randn(200, 32)
    linear = Streamed(moe).tensor("model.layers.1.block_sparse_moe.router.layer.weight")
    mine, theirs = (x @ linear.T).topk(2)[1].sort()[0], gates[1].logits(x).topk(2)[1].sort()[0]
    assert (mine == theirs).float().mean() > (0.99 if router == "regression" else 0.8)
    assert (report["gates"] is None) == (router == "regression")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, dense):
    def content(folder):
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

    one, two, other = (make(tmp_path, dense, **ACTIVATION, seed=seed)[2] for seed in (0, 0, 1))
    assert content(one) == content(two)
    assert content(one) != content(other)
    assert (one.parent / "partition.safetensors").read_bytes() == (two.parent / "partition.safetensors").read_bytes()


def test_on_a_trained_model_what_is_fitted_more_loses_less(tmp_path, tiny_model, monkeypatch):
    text = "\n".join(documents("prose")[:60])
    ids = AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"][: 72 * 64]
    prose = np.array(ids).reshape(72, 64)
    monkeypatch.setattr(calibration, "draw", lambda *_, **__: (prose[:60], []))
    monkeypatch.setattr(identity, "sample_ids", lambda _: prose[:1])
    sizes = {"experts": 32, "top_k": 8}
    kinds = {
        "random": {"method": "random"},
        "activation": {"method": "activation"},
        "refit": {"method": "activation", "down_proj": "refit"},
        "fit": {"method": "activation", "down_proj": "refit", "fit_passes": 6},
    }
    width = Streamed(tiny_model).config.intermediate_size
    clusters = {"method": "token_clusters", "shared_experts": 1, "expert_size": width // 8, "top_k": 1}
    kinds |= {f"{n} clusters": clusters | {"experts": n, "down_proj": "refit"} for n in (1, 8)}
    losses = {"dense": Streamed(tiny_model).nll(prose[60:], batch=12).mean()}
    for name, options in kinds.items():
        moe = make(tmp_path, tiny_model, **sizes | options)[2]
        losses[name] = Streamed(moe).nll(prose[60:], batch=12).mean()
    assert losses["dense"] < losses["fit"] < losses["refit"] < losses["activation"] < losses["random"]
    assert losses["dense"] < losses["8 clusters"] < losses["1 clusters"] < losses["random"]

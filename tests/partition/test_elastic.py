"""One checkpoint for several top_k: an expert weighs the same, however many are chosen."""

import numpy as np
import pytest
import torch
from dense_models import dense_model, sample, stored
from transformers import AutoModelForCausalLM

from tasks import settings
from tasks.moe.streamed import Streamed
from tasks.partition import calibration, construct, identity, index, shapes

ELASTIC = {"method": "activation", "experts": 6, "shared_experts": 2, "top_k": 3, "elastic": [1, 3, 6]}
WINDOWS = sample((12, 40))


@pytest.fixture(autouse=True)
def text(monkeypatch):
    """Random tokens instead of a corpus and of the identity test's text: the tiny models have no tokenizer."""
    monkeypatch.setattr(calibration, "draw", lambda *_, **__: (WINDOWS, [("prose", i) for i in range(len(WINDOWS))]))
    monkeypatch.setattr(identity, "sample_ids", lambda _: sample((2, 40), seed=1))


def make(folder, **options):
    """(parent, report, index, the checkpoint's folder)."""
    parent, target = folder / "dense", folder / f"made-{len(list(folder.iterdir()))}"
    if not parent.exists():
        stored(parent, dense_model())
    target.mkdir()
    partition = settings.Partition(**ELASTIC | options)
    report = construct.construct(
        parent, folder / "absent", partition, seq_len=40, folder=target, report=lambda _: None
    )
    return parent, report, index.read(target / "partition.safetensors"), target / "moe"


def logits(folder, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits


def of_chosen_neurons(parent, moe, made, *, ids, top_k):
    """The dense model's logits, each FFN's neurons kept that stand in a shared or a chosen expert."""
    dense = AutoModelForCausalLM.from_pretrained(parent).eval()
    checkpoint = Streamed(moe)
    for i, layer in enumerate(dense.model.layers):
        router_ED = checkpoint.tensor(f"model.layers.{i}.mlp.gate.weight")
        experts_EF = torch.from_numpy(made.layers[i]).long()

        def keep(down, inputs, router_ED=router_ED, experts_EF=experts_EF, mlp=layer.mlp):
            chosen_TK = (mlp.read @ router_ED.T).topk(top_k, dim=-1).indices
            mask_TN = torch.zeros_like(inputs[0])
            mask_TN[..., experts_EF[:2].flatten()] = 1
            mask_TN.scatter_(-1, experts_EF[2:][chosen_TK].flatten(-2), 1)
            return (inputs[0] * mask_TN,)

        layer.mlp.register_forward_pre_hook(lambda mlp, inputs: setattr(mlp, "read", inputs[0]))
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    with torch.no_grad():
        return dense(torch.from_numpy(ids)).logits


def apart(given, expected):
    return ((given - expected).abs().max() / expected.abs().max()).item()


def test_at_every_top_k_the_checkpoint_is_the_sum_of_the_chosen_experts_neurons(tmp_path):
    parent, report, made, moe = make(tmp_path, router_std=1e-3)
    assert Streamed(moe).config.norm_topk_prob is False
    assert report["identity_error"] <= 1e-5
    ids = sample(seed=2)
    differences = []
    for top_k in range(1, 7):  # those that are not named too
        given = logits(moe, ids, num_experts_per_tok=top_k)
        assert apart(given, of_chosen_neurons(parent, moe, made, ids=ids, top_k=top_k)) < 3e-3
        differences.append(apart(given, logits(parent, ids)))
    assert differences[-1] < 3e-3 < differences[-2]  # with all experts it is the dense model
    assert torch.equal(logits(moe, ids), logits(moe, ids, num_experts_per_tok=3))


def test_without_unequal_weights_all_experts_are_the_dense_model(tmp_path):
    parent, report, _, moe = make(tmp_path, router_std=1e-6)
    assert report["identity_error_as_written"] <= 1e-5
    ids = sample(seed=2)
    assert apart(logits(moe, ids, num_experts_per_tok=6), logits(parent, ids)) <= 1e-5


def test_a_refit_for_all_values_serves_them_better_than_one_for_the_usual_value(tmp_path):
    """Measured on the calibration text, all windows at each top_k, by the error of the logits."""
    errors = {}
    for name, elastic in (("elastic", [1, 3, 6]), ("usual", [3, 4])):
        parent, _, _, moe = make(tmp_path, elastic=elastic, down_proj="refit", calibration_windows=12)
        dense = logits(parent, WINDOWS)
        errors[name] = [
            (logits(moe, WINDOWS, num_experts_per_tok=k) - dense).square().mean().item() for k in (1, 3, 6)
        ]
    assert errors["elastic"][0] < errors["usual"][0]
    assert sum(errors["elastic"]) < sum(errors["usual"])
    assert errors["elastic"] == sorted(errors["elastic"], reverse=True)


def test_each_value_sees_the_windows_of_every_domain_in_turn():
    slots = [(domain, i) for i in range(6) for domain in ("code", "books")]
    dealt = calibration.deal(slots, [2, 6, 10])
    for place, _ in enumerate(("code", "books")):
        assert sorted(dealt[place::2]) == [2, 2, 6, 6, 10, 10]
    assert dealt[0] != dealt[1]
    assert dealt.dtype == np.int64


def test_the_largest_value_decides_whether_an_engine_can_run_it(tmp_path):
    parent = stored(tmp_path / "dense", dense_model(layers=60))
    options = ELASTIC | {"experts": 44, "shared_experts": 4, "engines": ["llama.cpp"]}
    shapes.require(parent.config, settings.Partition(**options | {"elastic": [1, 3, 20]}))
    with pytest.raises(ValueError, match=r"llama.cpp cannot run the qwen2_moe: 44 chosen experts in 60 layers"):
        shapes.require(parent.config, settings.Partition(**options | {"elastic": [1, 3, 44]}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "mixtral", "shared_experts": 0}, "divides the weights by the sum of the chosen"),
        ({"target": "granitemoeshared"}, "divides the weights by the sum of the chosen"),
        (
            {"experts": 4, "elastic": [1, 3, 4], "shared_experts": 0},
            "8 neurons are shared; .*shared_experts to 1 or more",
        ),
    ],
)
def test_what_cannot_serve_several_values_is_refused(tmp_path, options, reason):
    parent = stored(tmp_path / "dense", dense_model())
    with pytest.raises(ValueError, match=reason):
        shapes.require(parent.config, settings.Partition(**ELASTIC | {"engines": ["llama.cpp"]} | options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"elastic": [1, 2, 6]}, "leaves out top_k = 3"),
        ({"elastic": [3, 1, 6]}, "in ascending order"),
        ({"elastic": [3, 3]}, "name each top_k once"),
        ({"elastic": [3, 7]}, "from 1 to experts = 6"),
        ({"scale": "paper"}, "set scale: unit"),
        ({"gate": "tanh"}, "set gate: linear"),
        ({"method": "copy", "shared_experts": 0}, "experts of method `copy` overlap"),
        ({"method": "token_clusters", "top_k": 1, "expert_size": 6}, "experts of method `token_clusters` overlap"),
    ],
)
def test_settings_that_cannot_serve_several_values_are_refused_with_the_fix(options, reason):
    with pytest.raises(ValueError, match=reason):
        settings.Partition(**ELASTIC | options)

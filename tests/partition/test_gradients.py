"""Importance scores, held against autograd through the whole model and against neurons really set to zero."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.moe.streamed import Streamed
from tasks.partition import gradients
from tests import models
from tests.conftest import documents


def dense(folder, kind="llama", **fields):
    model = models.build(kind, intermediate_size=40, num_hidden_layers=3, **fields)
    model.save_pretrained(folder / "dense")
    return model


def scores(folder, ids, tmp_path, *, layers, clusters):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    options = {"layers": layers, "clusters": clusters, "seed": 0, "scratch": scratch, "report": lambda text: None}
    result = gradients.importance(Streamed(folder), ids, **options)
    assert list(scratch.iterdir()) == []
    return result


def autograd(model, ids):
    """|h dL/dh| of every token, layer and neuron by one backward pass through the whole model: [layers, B, L, N]."""
    kept = []

    def tap(_module, arguments):
        arguments[0].retain_grad()
        kept.append(arguments[0])

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(tap)
    ids = torch.from_numpy(ids)
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.stack([(h * h.grad).abs().detach() for h in kept])


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_scores_are_those_of_autograd_through_the_whole_model(kind, tied, tmp_path):
    model = dense(tmp_path, kind, tie_word_embeddings=tied)
    ids = np.random.default_rng(0).integers(0, 64, (5, 100))
    scores_CN, cluster_BS = scores(tmp_path / "dense", ids, tmp_path, layers=[0, 2], clusters=3)
    assert list(scores_CN) == [0, 2]
    assert cluster_BS.shape == (5, 2)
    assert sorted(np.bincount(cluster_BS.reshape(-1), minlength=3)) == [3, 3, 4]
    expected = autograd(model, ids)
    for i, score_CN in scores_CN.items():
        for cluster, score_N in enumerate(score_CN):
            tokens = torch.from_numpy(np.repeat(cluster_BS == cluster, 64, axis=1)[:, :100])
            torch.testing.assert_close(
                torch.from_numpy(score_N), expected[i][tokens].sum(0), rtol=1e-5, atol=1e-5 * score_CN.max()
            )


def test_the_same_seed_gives_the_same_bytes_and_windows_may_be_cut_into_any_batches(tmp_path, monkeypatch):
    dense(tmp_path)
    ids = np.random.default_rng(0).integers(0, 64, (7, 70))
    one, clusters = scores(tmp_path / "dense", ids, tmp_path, layers=[1], clusters=4)
    two, same = scores(tmp_path / "dense", ids, tmp_path, layers=[1], clusters=4)
    assert one[1].tobytes() == two[1].tobytes()
    np.testing.assert_array_equal(clusters, same)
    monkeypatch.setattr(gradients, "_TOKENS", 1)
    monkeypatch.setattr(gradients, "_POSITIONS", 11)
    small, _ = scores(tmp_path / "dense", ids, tmp_path, layers=[1], clusters=4)
    np.testing.assert_allclose(small[1], one[1], rtol=1e-4, atol=1e-5 * one[1].max())


def test_fewer_segments_than_clusters_are_refused_by_the_name_of_the_field(tmp_path):
    dense(tmp_path)
    with pytest.raises(ValueError, match=r"calibration_windows = 3: .* give 6 segments .* 7 text clusters"):
        scores(tmp_path / "dense", np.zeros((3, 100), dtype=np.int64), tmp_path, layers=[0], clusters=7)
    with pytest.raises(ValueError, match="at least two tokens"):
        scores(tmp_path / "dense", np.zeros((3, 1), dtype=np.int64), tmp_path, layers=[0], clusters=2)


def test_texts_of_two_kinds_fall_into_two_clusters(tmp_path):
    dense(tmp_path)
    kind = np.arange(12) % 2
    ids = np.random.default_rng(0).integers(0, 4, (12, 64)) + 4 * kind[:, None]
    _, cluster_BS = scores(tmp_path / "dense", ids, tmp_path, layers=[1], clusters=2)
    np.testing.assert_array_equal(cluster_BS[:, 0] == cluster_BS[0, 0], kind == 0)


def test_important_neurons_are_those_whose_loss_changes_when_they_are_set_to_zero(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    windows = [np.array(tokenizer("\n".join(documents(kind)[:9]))["input_ids"][:512]) for kind in ("prose", "code")]
    ids = np.concatenate(windows).reshape(16, 64)
    scores_CN, _ = scores(tiny_model, ids, tmp_path, layers=[0, 1], clusters=2)
    model, text = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), torch.from_numpy(ids)
    with torch.no_grad():
        whole = model(input_ids=text, labels=text).loss.item()
        for i, layer in enumerate(model.model.layers):
            down, changes = layer.mlp.down_proj.weight.data, []
            for neuron in range(0, down.shape[1], 2):
                column = down[:, neuron].clone()
                down[:, neuron] = 0
                changes.append(abs(model(input_ids=text, labels=text).loss.item() - whole))
                down[:, neuron] = column
            assert spearmanr(scores_CN[i].sum(0)[::2], changes).statistic > 0.65

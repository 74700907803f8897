"""Importance scores, held against autograd through the whole model and against neurons really set to zero."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from tasks.moe.streamed import Streamed
from tasks.partition import gradients


def dense(kind=LlamaForCausalLM, **options):
    torch.manual_seed(1)
    config = kind.config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **options,
    )
    return kind(config).eval()


def scores(folder, ids, tmp_path, *, layers, clusters, seed=0):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    found = gradients.importance(
        Streamed(folder),
        ids,
        layers=layers,
        clusters=clusters,
        seed=seed,
        scratch=scratch,
        report=lambda text: None,
    )
    assert list(scratch.iterdir()) == []
    return found


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


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_those_of_autograd_through_the_whole_model(kind, tied, tmp_path):
    model = dense(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    ids = np.random.default_rng(0).integers(0, 64, (5, 100))
    found, cluster_BS = scores(tmp_path / "dense", ids, tmp_path, layers=[0, 2], clusters=3)
    assert list(found) == [0, 2]
    assert cluster_BS.shape == (5, 2)
    assert sorted(np.bincount(cluster_BS.reshape(-1), minlength=3)) == [3, 3, 4]
    expected = autograd(model, ids)
    for i, score_CN in found.items():
        for cluster, score_N in enumerate(score_CN):
            tokens = torch.from_numpy(np.repeat(cluster_BS == cluster, 64, axis=1)[:, :100])
            torch.testing.assert_close(
                torch.from_numpy(score_N), expected[i][tokens].sum(0), rtol=1e-5, atol=1e-5 * score_CN.max()
            )


def test_the_same_seed_gives_the_same_bytes_and_windows_may_be_cut_into_any_batches(tmp_path, monkeypatch):
    dense().save_pretrained(tmp_path / "dense")
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
    dense().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"calibration_windows = 3: .* give 6 segments .* 7 text clusters"):
        scores(tmp_path / "dense", np.zeros((3, 100), dtype=np.int64), tmp_path, layers=[0], clusters=7)
    with pytest.raises(ValueError, match="at least two tokens"):
        scores(tmp_path / "dense", np.zeros((3, 1), dtype=np.int64), tmp_path, layers=[0], clusters=2)


@pytest.fixture(scope="module")
def texts(tiny_model, tiny_data):
    """16 windows of 64 tokens of each of the tiny data's two domains."""
    import gzip
    import json

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    windows = []
    for name, opener in {"prose.jsonl.gz": gzip.open, "code.jsonl": open}.items():
        with opener(tiny_data / name, "rt") as file:
            text = "".join(json.loads(line)["text"] for line, _ in zip(file, range(40), strict=False))
        windows.append(np.array(tokenizer(text)["input_ids"][: 16 * 64]).reshape(16, 64))
    return np.concatenate(windows)


def test_texts_of_two_kinds_fall_into_two_clusters(tmp_path):
    dense().save_pretrained(tmp_path / "dense")
    kind = np.arange(12) % 2
    ids = np.random.default_rng(0).integers(0, 4, (12, 64)) + 4 * kind[:, None]
    _, cluster_BS = scores(tmp_path / "dense", ids, tmp_path, layers=[1], clusters=2)
    np.testing.assert_array_equal(cluster_BS[:, 0] == cluster_BS[0, 0], kind == 0)


@pytest.mark.parametrize("layer", [0, 1])
def test_important_neurons_are_those_whose_loss_changes_when_they_are_set_to_zero(layer, tiny_model, texts, tmp_path):
    found, _ = scores(tiny_model, texts, tmp_path, layers=[layer], clusters=2)
    model, ids = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), torch.from_numpy(texts)
    down = model.model.layers[layer].mlp.down_proj.weight.data
    changes = []
    with torch.no_grad():
        whole = model(input_ids=ids, labels=ids).loss.item()
        for neuron in range(down.shape[1]):
            column = down[:, neuron].clone()
            down[:, neuron] = 0
            changes.append(abs(model(input_ids=ids, labels=ids).loss.item() - whole))
            down[:, neuron] = column
    rank = spearmanr(found[layer].sum(0), changes).statistic
    assert rank > 0.65

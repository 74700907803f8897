"""Analyses of weights on experts whose figures are known: copies, reordered copies, slices of a dense FFN."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks import architectures, settings
from tasks.moe.internals import layers as internals
from tasks.moe.streamed import Streamed
from tasks.partition import convert, exporters
from tasks.partition import index as index_file
from tasks.plugins.analysis import run
from tasks.plugins.analysis import text as texts
from tasks.plugins.analysis.measures import reordering, router, similarity
from tasks.plugins.analysis.registry import ANALYSES
from tasks.plugins.analysis.stream import Stream
from tests import models

SIZE, WIDTH = 12, 48
WINDOWS = {"prose": np.random.default_rng(0).integers(6, 64, (2, 10))}
MATRICES = ("gate", "up", "down")


def moe(folder, alter):
    """A Mixtral of one layer whose experts were altered by `alter(gate_EFD, up_EFD, down_EFD)`."""
    model = models.build("mixtral", num_hidden_layers=1, **models.EXPERTS)
    ffn = internals.sparse_ffn(model.model.layers[0])
    alter(ffn.gate_EFD, ffn.up_EFD, ffn.down_EDF.mT)
    model.save_pretrained(folder)
    return folder


def analysed(folder, tmp_path, **options):
    result = run.analyse({"it": folder}, ANALYSES, **{"windows": WINDOWS, "folder": tmp_path / "unfinished"} | options)
    return {name: each["models"]["it"] for name, each in result["analyses"].items()}


def test_copies_of_one_expert_are_identical_and_the_regression_is_undefined_and_says_so(tmp_path):
    def copy(*matrices):
        for weights_EFD in matrices:
            weights_EFD[:] = weights_EFD[:1].clone()

    found = analysed(moe(tmp_path / "copies", copy), tmp_path)
    for chart in ("between experts: whole matrices", "between experts: mean neurons"):
        assert found["similarity"]["mean"][chart] == dict.fromkeys(MATRICES, 1.0)
    assert found["reordering"]["mean"]["Kendall's tau"] == dict.fromkeys(MATRICES, 1.0)
    assert found["reordering"]["mean"]["gain of cosine by matching"] == dict.fromkeys(MATRICES, 0.0)
    assert found["outputs"]["mean"]["angular similarity"]["routed with routed"] == pytest.approx(1, abs=1e-6)
    assert found["router"]["mean"]["R²"] == dict.fromkeys(MATRICES)
    (reason,) = found["router"]["undefined"]
    assert "gate: all pairs of experts are equally alike (cosine 1.000)" in reason


def test_the_order_of_a_reordered_copy_is_found_in_every_matrix(tmp_path):
    order = np.random.default_rng(1).permutation(WIDTH)

    def reorder(*matrices):
        for weights_EFD in matrices:
            weights_EFD[1] = weights_EFD[0][order]

    folder = moe(tmp_path / "reordered", reorder)
    layer = Stream(Streamed(folder), text=None).layer(0, wanted=True)
    concordant = sum(
        np.sign(order[b] - order[a]) for a, b in itertools.combinations(range(WIDTH), 2)
    )  # of the order that undoes it too
    for name in MATRICES:
        first, second = layer.matrix(name)[:2]
        np.testing.assert_array_equal(order[reordering.best_order(first, second)], np.arange(WIDTH))
        before, after, tau = reordering.match(first, second)
        assert before == pytest.approx(
            torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).item(), abs=1e-6
        )
        assert after == pytest.approx(1)
        assert tau == pytest.approx(concordant / (WIDTH * (WIDTH - 1) / 2))


def test_cosines_are_those_of_the_flattened_matrices_and_of_the_mean_neurons(tmp_path):
    folder = moe(tmp_path / "random", lambda *_: None)
    layer = Stream(Streamed(folder), text=None).layer(0, wanted=True)
    figures = similarity.measure(layer)
    stored = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe.experts"
    expected = {
        name: torch.stack([stored[f"{prefix}.{e}.{w}.weight"] for e in range(6)]).double()
        for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }
    expected["down"] = expected["down"].mT
    for name, weights_EFD in expected.items():
        for kept, rows in (("matrices", weights_EFD.flatten(1)), ("mean_neurons", weights_EFD.mean(1))):
            values = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
            np.testing.assert_allclose(figures.detail[kept][name], values, atol=1e-6)


def test_r2_is_that_of_the_correlation_and_three_points_on_a_line_have_one():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 15))
    (slope, r), reason = router.regression(x, y)
    assert reason == ""
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert slope == pytest.approx(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert router.regression(np.array([0.0, 1.0, 3.0]), np.array([1.0, 0.0, -2.0]))[0] == pytest.approx((-1, -1))


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([0.1, 0.2], [0.3, 0.4], "2 pairs of experts"),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], "all pairs of router rows are equally alike"),
        ([np.nan] * 3, [0.1, 0.2, 0.3], "some router rows are zero"),
    ],
)
def test_a_regression_that_says_nothing_is_left_out_with_the_reason(x, y, reason):
    fit, said = router.regression(np.array(x), np.array(y))
    assert fit is None
    assert reason in said


def converted(folder, *, target, shared, places):
    """A dense model and the sparse one that is cut from it by `places`, the same in all layers; and their index."""
    kind = "qwen3" if architectures.SPARSE[target].qk_norm else "llama"
    models.build(kind, num_hidden_layers=2).save_pretrained(folder / "dense")
    parent = Streamed(folder / "dense")
    partition = settings.Partition(
        method="activation", experts=4 - shared, shared_experts=shared, top_k=1, target=target
    )
    exporter = exporters.choose(parent.config, partition)
    with convert.moe_writer(parent, folder / "moe", exporter=exporter, partition=partition) as write:
        for i in range(2):
            router = torch.randn(4 - shared, 32, generator=torch.Generator().manual_seed(i))
            cut = convert.slices(*convert.ffn(parent, i), places, shared=shared, scale=1.0, router_ED=router)
            write(i, cut)
    index = index_file.Index(
        layers=dict.fromkeys(range(2), places),
        scales=dict.fromkeys(range(2), 1.0),
        shared_experts=shared,
        meta={"settings": partition.model_dump()},
    )
    index_file.write(index, folder / "partition.safetensors")
    return parent, folder / "moe", folder / "partition.safetensors"


CUTS = [(kind, int(bool(row.shared_size))) for kind, row in architectures.SPARSE.items()]
IDLE = [(kind, 0) for kind, row in architectures.SPARSE.items() if row.shared_gate]


@pytest.mark.parametrize(("target", "shared"), [*CUTS, *IDLE])
def test_the_experts_of_a_partition_sum_to_the_dense_ffn_on_the_layers_own_input(target, shared, tmp_path):
    row = architectures.SPARSE[target]
    places = np.random.default_rng(3).permutation(WIDTH).astype(np.int32).reshape(4, SIZE)
    parent, folder, index = converted(tmp_path, target=target, shared=shared, places=places)
    stream = Stream(Streamed(folder), text=texts.make(WINDOWS, folder))
    for i in range(2):
        layer = stream.layer(i, wanted=True)
        x_TD = layer.text().inputs_TD
        assert layer.shared == shared, "a shared expert of idle neurons is none"
        half = 0.5 if row.shared_gate else 1.0
        total = sum(layer.expert(x_TD, e) * (half if e < layer.shared else 1.0) for e in range(4))
        with torch.no_grad():
            torch.testing.assert_close(total, parent.block(i).mlp(x_TD), rtol=1e-4, atol=1e-5)
    found = analysed(folder, tmp_path, parent=parent.folder, index=index)["similarity"]
    assert found["mean"]["with the parent's neurons at the same places"] == dict.fromkeys(MATRICES, 1.0)
    assert found["layers"]["0"]["neurons_in_common"] == np.eye(4).tolist()


def test_overlapping_experts_are_held_against_the_neurons_that_each_of_them_has(tmp_path):
    places = np.stack([np.arange(start, start + SIZE) for start in (0, 12, 18, 24)]).astype(np.int32)
    parent, folder, index = converted(tmp_path, target="granitemoeshared", shared=1, places=places)
    read = index_file.read(index)
    read.meta["settings"] = settings.Partition(
        method="token_clusters", experts=3, shared_experts=1, top_k=1, expert_size=SIZE, calibration_windows=1
    ).model_dump()
    index_file.write(read, index)
    found = analysed(folder, tmp_path, parent=parent.folder, index=index)
    assert found["similarity"]["mean"]["with the parent's neurons at the same places"] == dict.fromkeys(MATRICES, 1.0)
    common = found["similarity"]["layers"]["1"]["neurons_in_common"]
    assert common == [[1, 0, 0, 0], [0, 1, 0.5, 0], [0, 0.5, 1, 0.5], [0, 0, 0.5, 1]]
    pairs = found["reordering"]["layers"]["0"]
    after = dict(zip(map(tuple, pairs["pairs"]), pairs["after"]["gate"], strict=True))
    assert after["0", "1"] > 0.4 > after["0", "2"], "half of the neurons are the same"
    assert set(after) == set(itertools.combinations(["shared 0", "0", "1", "2"], 2))


def test_without_an_index_experts_as_wide_as_the_parents_ffn_are_copies_of_it_and_others_need_one(tmp_path):
    dense = models.build("mistral", num_hidden_layers=1)
    dense.save_pretrained(tmp_path / "dense")
    mlp = dense.model.layers[0].mlp
    weights = (mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.T)

    def copy(*matrices):
        for weights_EFD, weight_FD in zip(matrices, weights, strict=True):
            weights_EFD[:3] = weight_FD

    found = analysed(moe(tmp_path / "moe", copy), tmp_path, parent=tmp_path / "dense")["similarity"]["layers"]["0"]
    for name in MATRICES:
        assert found["own_slice"][name][:3] == [1, 1, 1]
        assert max(map(abs, found["own_slice"][name][3:])) < 0.3
    models.build("mistral", num_hidden_layers=1, intermediate_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide: intermediate_size = 64, and the experts of .* have 48 neurons"):
        analysed(tmp_path / "moe", tmp_path, parent=tmp_path / "wide")

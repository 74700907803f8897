"""Every model class through all analyses, held against transformers' own forward pass of the whole model."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from tasks import architectures
from tasks.moe import checkpoint
from tasks.moe.internals import layers as internals
from tasks.moe.streamed import Streamed
from tasks.plugins.analysis import run
from tasks.plugins.analysis import text as texts
from tasks.plugins.analysis.registry import ANALYSES
from tasks.plugins.analysis.stream import Stream
from tests import models

EXPERTS, TOP_K, LAYERS, LENGTH = 6, 2, 3, 12
WINDOWS = {
    domain: np.random.default_rng(i).integers(6, 64, (windows, LENGTH))
    for i, (domain, windows) in enumerate({"prose": 2, "code": 3}.items())
}
TOKENS = 5 * LENGTH


def fields(kind):
    row = architectures.ALL[kind]
    if not isinstance(row, architectures.Sparse):
        return {}
    size = 48 if row.expert_size == "intermediate_size" else 16
    places = {"mlp_only_layers": [1]} if row.dense_layers else {}
    return models.own_fields(
        kind, experts=EXPERTS, top_k=TOP_K, expert_size=size, shared_size=2 * size, places=places
    ) | ({"norm_topk_prob": True} if row.unnormalised else {})


@pytest.fixture(scope="module", params=architectures.SPARSE)
def made(request, tmp_path_factory):
    """(folder, a second folder whose routers differ, the result of all analyses on both)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = models.build(request.param, num_hidden_layers=LAYERS, **fields(request.param))
    model.save_pretrained(folder / "first")
    for module in model.modules():
        if internals.is_router(module):
            module.weight.data += 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "second")
    both = {name: folder / name for name in ("first", "second")}
    return *both.values(), run.analyse(both, ANALYSES, windows=WINDOWS, folder=folder / "unfinished")


@pytest.fixture(scope="module")
def whole(made):
    """{layer: what router and FFN of the whole model read and gave}, of its sparse layers."""
    model = checkpoint.load(made[0], dtype=torch.float32)
    records = {}
    for i, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if internals.is_router(module):
                records[i] = record = {}
                module.register_forward_hook(lambda _m, x, out, record=record: record.update(router=(x[0], *out)))
        for name in ("mlp", "block_sparse_moe", "shared_mlp"):
            if i in records and getattr(layer, name, None) is not None:
                getattr(layer, name).register_forward_hook(
                    lambda _m, _x, out, record=records[i], name=name: record.update(
                        {name: out[0] if isinstance(out, tuple) else out}
                    )
                )
    with torch.no_grad():
        model(input_ids=torch.from_numpy(np.concatenate(list(WINDOWS.values()))), use_cache=False)
    return records


@pytest.fixture(scope="module")
def sparse_layers(made):
    """{layer: as the stream gives it}, held beyond their time."""
    text = texts.make(WINDOWS, made[0])
    stream = Stream(Streamed(made[0]), text=text)
    return {i: layer for i in range(LAYERS) if (layer := stream.layer(i, wanted=True)) is not None}


def test_router_and_experts_read_and_choose_what_they_do_in_the_whole_model(whole, sparse_layers):
    assert list(sparse_layers) == list(whole)
    for i, layer in sparse_layers.items():
        read, logits, _, chosen = whole[i]["router"]
        seen = layer.text()
        torch.testing.assert_close(seen.inputs_TD, read.reshape(TOKENS, -1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.logits_TE, logits.float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(seen.chosen_TK, chosen)


def test_the_experts_run_one_by_one_sum_to_the_ffn_by_the_routers_weights(whole, sparse_layers):
    for i, layer in sparse_layers.items():
        record, x_TD = whole[i], layer.text().inputs_TD
        _, _, weights_TK, chosen_TK = record["router"]
        out_XTD = torch.stack([layer.expert(x_TD, e) for e in range(layer.shared + layer.experts)])
        chosen_KTD = out_XTD[layer.shared :].gather(0, chosen_TK.T[:, :, None].expand(-1, -1, x_TD.shape[1]))
        total_TD = (chosen_KTD * weights_TK.T[:, :, None]).sum(0)
        switch = layer.ffn.shared_switch_1D
        weight = 1.0 if switch is None else F.linear(x_TD, switch).sigmoid()
        total_TD += out_XTD[: layer.shared].sum(0) * weight
        expected = sum(record[name] for name in ("mlp", "block_sparse_moe", "shared_mlp") if name in record)
        torch.testing.assert_close(total_TD, expected.reshape(TOKENS, -1), rtol=1e-4, atol=1e-5)
        assert layer.shared == (2 if len(layer.ffn.shared_gate_MD) else 0)


def test_outputs_and_ranks_are_those_of_every_expert_on_every_token_by_plain_formulas(sparse_layers):
    layer = list(sparse_layers.values())[-1]
    x_TD = layer.text().inputs_TD
    out_XTD = torch.stack([layer.expert(x_TD, e) for e in range(layer.shared + EXPERTS)]).double()
    np.testing.assert_allclose(layer.outputs.norm_TX.T, out_XTD.norm(dim=2), rtol=1e-9)
    for a, b in itertools.combinations(range(len(out_XTD)), 2):
        cosine_T = F.cosine_similarity(out_XTD[a], out_XTD[b], dim=1)
        assert layer.outputs.cosine_XX[a, b] == pytest.approx(cosine_T.mean().item())
        assert layer.outputs.angular_XX[a, b] == pytest.approx((1 - cosine_T.acos() / np.pi).mean().item())
    figures = ANALYSES["norms"].measure(layer)
    by_token = [
        stats.spearmanr(norm_X[layer.shared :], logits_E).statistic
        for norm_X, logits_E in zip(layer.outputs.norm_TX, layer.text().logits_TE, strict=True)
    ]
    assert figures.curves["correlation of the ranks"]["Spearman"] == pytest.approx(np.mean(by_token))
    table = np.zeros((EXPERTS, EXPERTS), dtype=int)
    for norm_X, logits_E in zip(layer.outputs.norm_TX, layer.text().logits_TE.numpy(), strict=True):
        for i, j in zip(stats.rankdata(-norm_X[layer.shared :]), stats.rankdata(-logits_E), strict=True):
            table[int(i) - 1, int(j) - 1] += 1
    assert figures.detail["table"] == table.tolist()


def test_rows_of_the_rank_table_sum_to_the_tokens_and_loads_to_tokens_times_top_k(made, whole):
    result = made[2]
    assert result["text"]["tokens"] == TOKENS
    for key in ("first", "second"):
        of = {name: result["analyses"][name]["models"][key]["layers"] for name in ("norms", "load", "coactivation")}
        assert list(of["load"]) == [str(i) for i in whole]
        for i in of["load"]:
            assert [sum(row) for row in of["norms"][i]["table"]] == [TOKENS] * EXPERTS
            loads = of["load"][i]["load"]["domain"]
            assert {domain: sum(load) for domain, load in loads.items()} == {
                domain: ids.size * TOP_K for domain, ids in WINDOWS.items()
            }
            pairs = np.array(of["coactivation"][i]["pairs"])
            assert pairs.diagonal().tolist() == np.sum(list(loads.values()), axis=0).tolist()
            assert (pairs.sum(1) == TOP_K * pairs.diagonal()).all()


def test_pairs_with_the_layer_below_are_those_of_both_choices_of_a_token(made, whole):
    found = made[2]["analyses"]["coactivation"]["models"]["first"]
    first, *others = whole
    assert found["undefined"] == {"with the layer below: it is the first": [first]}
    for below, i in itertools.pairwise([first, *others]):
        counted = np.zeros((EXPERTS, EXPERTS), dtype=int)
        for lower, upper in zip(whole[below]["router"][3].tolist(), whole[i]["router"][3].tolist(), strict=True):
            for pair in itertools.product(lower, upper):
                counted[pair] += 1
        assert found["layers"][str(i)]["from_below"] == counted.tolist()
        far = found["layers"][str(i)]["figures"]["distance from independence"]["with the layer below"]
        independent = np.outer(counted.sum(1), counted.sum(0)) / counted.sum() ** 2
        assert far == pytest.approx(np.abs(counted / counted.sum() - independent).sum() / 2, abs=1e-6)


def test_stability_is_the_share_of_the_experts_that_both_models_choose(made, whole):
    second = {}
    model = checkpoint.load(made[1], dtype=torch.float32)
    for i, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if internals.is_router(module):
                module.register_forward_hook(lambda m, _x, out, i=i: second.update({i: (out[2], m.weight.detach())}))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(np.concatenate(list(WINDOWS.values()))), use_cache=False)
    found = made[2]["analyses"]["stability"]["models"]
    assert set(found) == {"second"}, "the first has nothing before it"
    for i, record in whole.items():
        read, _, _, before_TK = record["router"]
        after_TK, weight = second[i]
        again_TK = F.linear(read.reshape(TOKENS, -1), weight).topk(TOP_K).indices
        figures = found["second"]["layers"][str(i)]["figures"]["share of the same choices"]
        for name, chosen_TK in (("as each model runs", after_TK), ("the other's hidden states", again_TK)):
            shared = [len({*a} & {*b}) / TOP_K for a, b in zip(chosen_TK.tolist(), before_TK.tolist(), strict=True)]
            assert figures[name] == pytest.approx(np.mean(shared), abs=1e-6)


def test_one_layer_at_a_time_is_in_memory(made, tmp_path, monkeypatch):
    alive, real = [], Streamed.block

    def watched(self, i):
        gc.disable()
        assert not [ref for ref in alive if ref()], "an earlier layer is still in memory"
        block = real(self, i)
        alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Streamed, "block", watched)
    try:
        run.analyse({"first": made[0]}, ["outputs", "similarity"], windows=WINDOWS, folder=tmp_path)
    finally:
        gc.enable()
    assert len(alive) == LAYERS


@pytest.mark.parametrize("kind", architectures.DENSE)
def test_a_dense_checkpoint_is_refused_by_its_class(kind, tmp_path):
    models.build(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a {kind} without sparse layers has no experts"):
        run.analyse({"dense": tmp_path}, ANALYSES, windows=None, folder=tmp_path / "unfinished")

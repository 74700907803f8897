"""window_nll, expert_load and load on a real tiny checkpoint, dense and sparse."""

import math

import numpy as np
import pytest
import torch

from tasks import architectures
from tasks.moe import checkpoint, loss, routing
from tests import models

_QWEN = models.QWEN | {"mlp_only_layers": [1]}
_SPARSE = {
    "mixtral": models.EXPERTS,
    "granitemoe": models.EXPERTS,
    "granitemoeshared": models.EXPERTS | {"shared_intermediate_size": 24, "logits_scaling": 2.0},
    "qwen2_moe": _QWEN | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _QWEN | {"head_dim": 8},
}


@pytest.fixture(params=_SPARSE)
def sparse(request):
    return models.build(request.param, varied=False, num_hidden_layers=3, **_SPARSE[request.param])


def _ids(vocabulary, shape=(5, 300)):
    return np.random.default_rng(0).integers(0, vocabulary, shape)


def test_window_nll_is_hugging_faces_loss_times_the_predicted_tokens(tiny_model):
    model = checkpoint.load(tiny_model)
    ids = _ids(512, (5, 200))
    expected = []
    for row in torch.from_numpy(ids):
        with torch.no_grad():
            expected.append(model(input_ids=row[None], labels=row[None]).loss.item() * 199)
    np.testing.assert_allclose(loss.window_nll(model, ids, batch=2), expected, rtol=1e-5)


def test_window_nll_of_a_sparse_model_leaves_the_balance_loss_out(sparse):
    sparse.config.output_router_logits = True
    ids = _ids(64)
    with torch.no_grad():
        logits = sparse(input_ids=torch.from_numpy(ids)).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction="none")
    np.testing.assert_allclose(loss.window_nll(sparse, ids, batch=3), nll.sum(1), rtol=1e-5)


def test_window_nll_does_not_depend_on_the_batch_and_restores_the_mode(sparse):
    sparse.train()
    ids = _ids(64)
    np.testing.assert_allclose(loss.window_nll(sparse, ids, batch=1), loss.window_nll(sparse, ids, batch=5), rtol=1e-6)
    assert sparse.training


def test_windows_of_one_token_are_refused(sparse):
    with pytest.raises(ValueError, match="L >= 2"):
        loss.window_nll(sparse, _ids(64, (3, 1)), batch=1)


def test_perplexity_and_bits_per_byte_are_those_of_a_fair_byte():
    assert loss.perplexity(math.log(256)) == pytest.approx(256)
    assert loss.perplexity(1e4) == math.inf
    assert loss.bits_per_byte(10 * math.log(256), num_bytes=10) == pytest.approx(8)


def test_expert_load_counts_top_k_experts_for_every_token_of_every_layer(sparse):
    with routing.expert_load(sparse) as load_LE, torch.no_grad():
        sparse(input_ids=torch.from_numpy(_ids(64, (2, 50))))
        assert (load_LE.sum(1) == 2 * 50 * 2).all()
        sparse(input_ids=torch.from_numpy(_ids(64, (1, 7))))
    assert load_LE.dtype == np.int64
    assert load_LE.shape == (2 if "mlp_only_layers" in sparse.config.to_dict() else 3, 6)
    assert (load_LE.sum(1) == 107 * 2).all()
    before = load_LE.copy()
    with torch.no_grad():
        sparse(input_ids=torch.from_numpy(_ids(64, (1, 7))))
    np.testing.assert_array_equal(load_LE, before)


def test_expert_load_names_the_experts_that_a_rigged_router_prefers(sparse):
    for gate in routing.routers(sparse):
        gate.weight.data.zero_()
        gate.weight.data[[1, 4]] = 1.0
    seen = []
    gate = routing.routers(sparse)[0]
    gate.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].reshape(-1, 32).sum(1)))
    with routing.expert_load(sparse) as load_LE, torch.no_grad():
        sparse(input_ids=torch.from_numpy(_ids(64, (2, 50))))
    positive = int((seen[0] > 0).sum())  # tokens whose logits for experts 1 and 4 are above the others' 0
    assert load_LE[0, 1] >= positive
    assert load_LE[0, 4] >= positive


def test_a_dense_model_has_no_routers_and_an_empty_load(tiny_model):
    model = checkpoint.load(tiny_model)
    assert routing.routers(model) == []
    with routing.expert_load(model) as load_LE, torch.no_grad():
        model(input_ids=torch.from_numpy(_ids(64)))
    assert load_LE.shape == (0, 0)


def test_a_sparse_checkpoint_loads_with_moe_kernels_and_gives_the_stock_logits(sparse, tmp_path):
    sparse.save_pretrained(tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config._experts_implementation == "moe_kernels"
    assert not loaded.training
    ids = torch.from_numpy(_ids(64, (2, 30)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, sparse(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_loading_from_an_empty_folder_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint here \(config.json is missing\)"):
        checkpoint.load(tmp_path)


def test_is_moe_knows_configs_and_their_dicts(sparse):
    assert architectures.is_moe(sparse.config)
    assert architectures.is_moe(sparse.config.to_dict())
    assert not architectures.is_moe({"model_type": "llama"})

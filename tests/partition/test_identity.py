"""With all experts on, a converted model gives its parent's logits, whatever the method, class and sizes."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from dense_models import dense_model, sample, splitting
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tasks import settings
from tasks.moe import checkpoint
from tasks.partition import build, identity, index

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_ROPES = [None, {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, _LLAMA3]


def _convert(dense, partition):
    split_index, found = splitting(dense, partition)
    moe = build.convert(dense, split_index, found.routers, partition=partition)
    moe.set_experts_implementation("eager")  # the default, grouped_mm, wants rows of a multiple of 16 bytes
    return moe, split_index


@given(
    method=st.sampled_from(["random", "activation"]),
    experts=st.sampled_from([3, 4, 6]),
    shared=st.sampled_from([0, 1, 2]),
    size=st.sampled_from([2, 5]),
    top_k=st.integers(1, 3),
    scale=st.sampled_from(["unit", "paper", "mean", "variance"]),
    tied=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 12]),
    bias=st.booleans(),
    rope=st.sampled_from(_ROPES),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_all_experts_on_is_the_dense_model(
    method, experts, shared, size, top_k, scale, tied, kv_heads, head_dim, bias, rope
):
    shared = 0 if method == "random" else shared
    dense = dense_model(
        width=size * (experts + shared),
        kv_heads=kv_heads,
        tied=tied,
        rope=rope,
        bias=bias and shared > 0,
        head_dim=head_dim,
    )
    partition = settings.Partition(
        method=method, experts=experts, shared_experts=shared, top_k=top_k, scale=scale, seed=size
    )
    moe, split_index = _convert(dense, partition)
    assert type(moe).__name__ == ("GraniteMoeSharedForCausalLM" if shared else "MixtralForCausalLM")
    assert split_index.problems(dense.config.intermediate_size) == []
    assert identity.error(moe, dense, sample(seed=1), scale=build.scale(partition)) <= 1e-5


def test_the_test_leaves_the_model_as_it_was(partition):
    dense = dense_model()
    moe, _ = _convert(dense, partition)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with torch.no_grad():
        expected = moe(input_ids=torch.from_numpy(sample())).logits
        identity.error(moe, dense, sample(), scale=build.scale(partition))
        assert torch.equal(moe(input_ids=torch.from_numpy(sample())).logits, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in moe.state_dict().items())


@pytest.mark.parametrize("harm", ["swapped neurons", "scale", "nan"])
def test_the_test_notices(partition, harm):
    dense = dense_model()
    moe, _ = _convert(dense, partition)
    block = moe.model.layers[1].block_sparse_moe.experts
    scale = build.scale(partition)
    with torch.no_grad():
        if harm == "swapped neurons":
            block.gate_up_proj[0, [0, 1]] = block.gate_up_proj[0, [1, 0]].clone()
        elif harm == "scale":
            scale *= 1.001
        else:
            block.down_proj[2, 3, 4] = float("nan")
    found = identity.error(moe, dense, sample(), scale=scale)
    with pytest.raises(identity.IdentityError, match=r"allowed for torch\.float32: 1e-05"):
        identity.require(found, torch.float32)


@pytest.mark.parametrize("shared", [0, 2], ids=["mixtral", "granitemoeshared"])
def test_a_plain_reload_gives_the_logits_of_the_model_in_memory(tmp_path, tiny_model, shared):
    dense = checkpoint.load(tiny_model)
    partition = settings.Partition(method="activation", experts=8 - shared, shared_experts=shared, top_k=3)
    moe, _ = _convert(dense, partition)
    build.write(moe, tmp_path / "moe", tokenizer_from=tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    moe.set_experts_implementation(plain.config._experts_implementation)
    ids = torch.from_numpy(sample())
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, moe(input_ids=ids).logits, rtol=0, atol=0)
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert plain.config.eos_token_id == dense.config.eos_token_id
    assert plain.config.max_position_embeddings == dense.config.max_position_embeddings


@pytest.fixture
def written(tmp_path, tiny_model, partition):
    dense = checkpoint.load(tiny_model)
    moe, split_index = _convert(dense, partition)
    build.write(moe, tmp_path / "moe", tokenizer_from=tiny_model)
    split_index = dataclasses.replace(split_index, meta={"scale": build.scale(partition)})
    index.write(split_index, tmp_path / "partition.safetensors")
    return tmp_path / "moe", tmp_path / "partition.safetensors", tiny_model


def test_verify_finds_nothing_wrong_with_what_the_stage_writes(written):
    assert identity.verify_checkpoint(*written) == []


def test_verify_names_experts_whose_rows_are_not_the_parents(written):
    moe_dir, index_path, dense_dir = written
    found = index.read(index_path)
    layers = [layer.copy() for layer in found.layers]
    layers[1][[2, 3]] = layers[1][[3, 2]]  # routed experts 0 and 1 exchanged
    index.write(dataclasses.replace(found, layers=tuple(layers)), index_path)
    (problem,) = identity.verify_checkpoint(moe_dir, index_path, dense_dir)
    assert "layer 1: gate or up rows of experts [0, 1]" in problem


def test_verify_reports_a_failed_identity_test(written, tmp_path):
    moe_dir, index_path, dense_dir = written
    other = tmp_path / "other"
    shutil.copytree(dense_dir, other)
    dense = checkpoint.load(other)
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight[0] += 1
    dense.save_pretrained(other)
    (problem,) = identity.verify_checkpoint(moe_dir, index_path, other)
    assert "identity test" in problem


def test_verify_reports_an_index_that_is_no_partition(written):
    moe_dir, index_path, dense_dir = written
    found = index.read(index_path)
    layers = [layer.copy() for layer in found.layers]
    layers[0][0, 0] = layers[0][1, 0]
    index.write(dataclasses.replace(found, layers=tuple(layers)), index_path)
    (problem,) = identity.verify_checkpoint(moe_dir, index_path, dense_dir)
    assert "layer 0 is no partition of the 128 neurons" in problem


def test_bfloat16_weights_pass_with_their_own_tolerance(tiny_model, partition):
    dense = checkpoint.load(tiny_model)
    moe, _ = _convert(dense, partition)
    found = identity.error(moe.to(torch.bfloat16).float(), dense.to(torch.bfloat16).float(), sample(), scale=2.0)
    assert found <= 1e-5  # a scale of 2 is exact in bfloat16
    assert np.isfinite(found)

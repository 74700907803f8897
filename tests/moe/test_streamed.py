"""Streamed against transformers' own loading of the same checkpoint, for every family that it reads."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.moe import checkpoint, loss
from tasks.moe.streamed import Streamed
from tests import models

KINDS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, llama3 rope, biases": {"rope_parameters": models.LLAMA3, "attention_bias": True, "mlp_bias": True},
    "llama, yarn rope, head_dim": {"rope_parameters": models.YARN, "head_dim": 12},
    "llama, dynamic rope": {"rope_parameters": models.DYNAMIC},
    "mistral": {"sliding_window": 8},
    "mistral, no window": {"sliding_window": None},
    "qwen2": {},
    "qwen2, sliding": models.SLIDING,
    "qwen3": {"head_dim": 12},
    "qwen3, sliding": models.SLIDING | {"max_window_layers": 2, "attention_bias": True},
    "granite": models.GRANITE,
    "mixtral": models.EXPERTS | {"sliding_window": 8},
    "granitemoe": models.EXPERTS | models.GRANITE,
    "granitemoeshared": models.EXPERTS | models.GRANITE | {"shared_intermediate_size": 12, "sliding_window": 8},
    "qwen2_moe": models.QWEN | models.SLIDING | {"mlp_only_layers": [1], "shared_expert_intermediate_size": 12},
    "qwen2_moe, every other": models.QWEN | {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 12},
    "qwen3_moe": models.QWEN | models.SLIDING | {"mlp_only_layers": [0], "head_dim": 12},
}


def save(kind, folder, **fields):
    model = models.build(kind, **{"num_hidden_layers": 3, "pad_token_id": 7} | KINDS[kind] | fields)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def ids(shape=(3, 40)):
    return np.random.default_rng(0).integers(0, 64, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hidden_states_logits_and_loss_are_those_of_the_whole_model(kind, tmp_path):
    streamed = Streamed(save(kind, tmp_path))
    whole = checkpoint.load(tmp_path, dtype=torch.float32)
    for i, layer in enumerate(whole.model.layers):
        block = streamed.block(i)
        attentions = layer.self_attn, block.self_attn
        assert len({getattr(attention, "sliding_window", None) for attention in attentions}) == 1
        expected, ours = layer.state_dict(), block.state_dict()
        assert list(ours) == list(expected)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    text = torch.from_numpy(ids())
    before_norm = []
    whole.model.norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0]))
    with torch.no_grad():
        logits = whole(input_ids=text, use_cache=False).logits
    hidden = streamed.forward(text, batch=3)
    assert torch.equal(hidden, before_norm[0])
    torch.testing.assert_close(streamed.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(streamed.nll(ids(), batch=2), loss.window_nll(whole, ids(), batch=2), rtol=1e-6)


def test_a_bfloat16_checkpoint_runs_in_float32_and_is_read_as_stored(tmp_path):
    streamed = Streamed(save("qwen2_moe", tmp_path, dtype=torch.bfloat16))
    whole = checkpoint.load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in streamed.block(0).parameters()} == {torch.float32}
    np.testing.assert_allclose(streamed.nll(ids(), batch=3), loss.window_nll(whole, ids(), batch=3), rtol=1e-6)
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(streamed.stored) == set(stored)
    for name, tensor in stored.items():
        assert (streamed.stored[name].dtype, streamed.stored[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(streamed.tensor(name), tensor)


def test_a_head_that_is_stored_beside_a_tied_embedding_is_the_one_in_use_as_in_transformers(tmp_path):
    folder = save("llama, tied", tmp_path)
    path = next(p for p in folder.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(p))
    content = load_file(path)
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"].flip(0).contiguous()}, path)
    ours = Streamed(folder).nll(ids(), batch=3)
    np.testing.assert_allclose(ours, loss.window_nll(checkpoint.load(folder), ids(), batch=3), rtol=1e-6)


def test_a_long_text_does_not_change_the_loss_at_the_chunks_border(tmp_path):
    streamed = Streamed(save("llama", tmp_path))
    whole = checkpoint.load(tmp_path)
    np.testing.assert_allclose(
        streamed.nll(ids((1, 300)), batch=1), loss.window_nll(whole, ids((1, 300)), batch=1), rtol=1e-6
    )


def test_attention_keywords_run_the_self_attention_alone(tmp_path):
    streamed = Streamed(save("mistral", tmp_path))
    whole = checkpoint.load(tmp_path)
    seen = []
    whole.model.layers[1].self_attn.register_forward_hook(
        lambda _module, _args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    with torch.no_grad():
        whole(input_ids=torch.from_numpy(ids()), use_cache=False)
        ours = streamed.block(1).self_attn(seen[0][0], **streamed.attention(1, 40))[0]
    assert torch.equal(ours, seen[0][1])
    assert streamed.attention(1, 7)["attention_mask"] is None
    near = torch.arange(40)[:, None] - torch.arange(40)
    assert torch.equal(streamed.attention(1, 40)["attention_mask"][0, 0], (near >= 0) & (near < 8))


def test_a_block_can_be_altered_before_it_runs_and_is_gone_afterwards(tmp_path):
    streamed = Streamed(save("llama", tmp_path))
    alive = []

    def silence(i, block):
        gc.disable()
        assert not [ref for ref in alive if ref()], "an earlier block is still in memory"
        alive.append(weakref.ref(block))
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()

    text = torch.from_numpy(ids())
    try:
        assert torch.equal(streamed.forward(text, blocks=silence), streamed.embed(text))
    finally:
        gc.enable()
    assert len(alive) == 3


def test_a_missing_a_foreign_and_a_misshapen_tensor_of_a_layer_are_refused(tmp_path):
    folder = save("qwen2", tmp_path)
    path = next(p for p in folder.glob("*.safetensors") if "model.layers.1.self_attn.k_proj.bias" in load_file(p))
    content = load_file(path)
    bias = content.pop("model.layers.1.self_attn.k_proj.bias")
    save_file(content, path)
    with pytest.raises(
        ValueError, match=r"index.json: these tensors are not in their files: model.layers.1.self_attn"
    ):
        Streamed(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: p.name for p in folder.glob("*.safetensors") for name in load_file(p)}})
    )
    streamed = Streamed(folder)
    streamed.block(0)
    with pytest.raises(ValueError, match=r"layer 1 .*missing_keys.*layers.1.self_attn.k_proj.bias"):
        streamed.block(1)
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.1.self_attn.k_proj.bias'"):
        streamed.tensor("model.layers.1.self_attn.k_proj.bias")
    save_file(content | {"model.layers.1.self_attn.k_proj.bias": bias[:5]}, path)
    with pytest.raises(ValueError, match=r"layer 1 .*mismatched_keys.*layers.1.self_attn.k_proj.bias"):
        Streamed(folder).block(1)
    save_file(
        content | {"model.layers.1.self_attn.k_proj.bias": bias, "model.layers.1.mlp.gate.weight": bias + 1}, path
    )
    with pytest.raises(ValueError, match=r"layer 1 .*unexpected_keys.*layers.1.mlp.gate.weight"):
        Streamed(folder).block(1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_missing_tensor_of_one_expert_is_refused(kind, tmp_path):
    streamed = Streamed(save(kind, tmp_path))
    name = next(name for name in streamed.layer_names(1) if ".experts.3." in name)
    del streamed.stored[name]
    with pytest.raises(ValueError, match=r"layer 1 is not that of a .*mlp.experts"):
        streamed.block(1)


def test_a_shard_that_is_cut_short_is_named_with_the_tensor(tmp_path):
    folder = save("llama", tmp_path)
    path = sorted(folder.glob("*.safetensors"))[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    last = max(load_names(whole), key=lambda item: item[1])[0]
    with pytest.raises(ValueError, match=rf"{path.name}: ends within tensor '{last}'"):
        Streamed(folder)
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=rf"{path.name}: its header is not that of a safetensors file"):
        Streamed(folder)
    path.write_bytes(whole)
    streamed = Streamed(folder)
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=rf"{path.name}: ends within tensor '{last}'"):
        streamed.tensor(last)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        Streamed(folder)


def load_names(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [(name, entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]


def test_old_buffers_of_the_rotary_embedding_are_left_out(tmp_path):
    folder = save("llama", tmp_path)
    path = min(folder.glob("*.safetensors"))
    names, nats = set(Streamed(folder).stored), Streamed(folder).nll(ids(), batch=3)
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    after = Streamed(folder)
    assert set(after.stored) == names
    np.testing.assert_array_equal(after.nll(ids(), batch=3), nats)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = save("llama", tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.ones(1)}, second)
    with pytest.raises(ValueError, match=rf"{second.name}: tensors \['{name}'\] stand in {first.name} as well"):
        Streamed(folder)


def test_other_families_quantised_weights_and_pickles_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint here \(config.json is missing\)"):
        Streamed(tmp_path)
    config = {"model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: model_type = 'gemma2'; read here: llama, mistral"):
        Streamed(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(models.SIZES | {"model_type": "llama", "quantization_config": {"bits": 4}})
    )
    with pytest.raises(ValueError, match="the weights are quantised"):
        Streamed(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(models.SIZES | {"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing; .* never from pickles \(.bin, .pt\)"):
        Streamed(tmp_path)


def test_windows_of_one_token_have_no_loss(tmp_path):
    with pytest.raises(ValueError, match="L >= 2"):
        Streamed(save("llama", tmp_path)).nll(ids((2, 1)), batch=1)

"""GGUF files of every architecture that is read, as the gguf package writes them; oracle: transformers' own reader."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tasks import settings, sources
from tasks.moe import checkpoint, dense

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def _build(file, tmp_path, **fields):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    entry = settings.Model(source=f"dir:{file}", license="MIT", **fields)
    return work / "model", dense.build(entry, work)


def _write(path, *, architecture="llama", drop=(), extra=None, fields=None, dtype=np.float32):
    """A GGUF of one layer, hidden 32, FFN 64, 2 heads of 16 (qwen3: 32), a byte-level tokenizer of 300."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_vocab_size(300)
    head_dim = 16
    if architecture == "llama":
        writer.add_rope_dimension_count(16)
    if architecture == "qwen3":
        head_dim = 32
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name, value in (fields or {}).items():
        writer.add_string(name, value)
    tokens = [chr(256 + i) for i in range(299)]
    tokens.append(tokens[0] + tokens[1])  # what the one merge makes
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    queries, keys = 2 * head_dim, head_dim
    shapes = {
        "token_embd.weight": (300, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (queries, 32),
        "blk.0.attn_k.weight": (keys, 32),
        "blk.0.attn_v.weight": (keys, 32),
        "blk.0.attn_output.weight": (32, queries),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    if architecture == "qwen2":
        shapes |= {"blk.0.attn_q.bias": (queries,), "blk.0.attn_k.bias": (keys,), "blk.0.attn_v.bias": (keys,)}
    if architecture == "qwen3":
        shapes |= {"blk.0.attn_q_norm.weight": (head_dim,), "blk.0.attn_k_norm.weight": (head_dim,)}
    tensors = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()} | (extra or {})
    for name, tensor in tensors.items():
        if name not in drop:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_becomes_safetensors_with_the_logits_of_transformers_own_reader(tmp_path, architecture):
    tensors = _write(tmp_path / "tiny.gguf", architecture=architecture)
    target, metrics = _build(tmp_path / "tiny.gguf", tmp_path)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert metrics["parameters"]["total"] == sum(tensor.size for tensor in tensors.values())
    ours, theirs = checkpoint.load(target), AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    np.testing.assert_array_equal(ours.model.embed_tokens.weight.detach(), tensors["token_embd.weight"])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(_logits(ours), _logits(theirs))


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["a", "ĠĠ", "1", "2"]), ("gpt-2", ["a", "Ġ", "Ġ12"])])
def test_digits_stand_alone_where_llama_cpp_says_so(tmp_path, pre, expected):
    """SmolLM2's own tokenizer.json: Digits(individual_digits=True), then ByteLevel."""
    _write(tmp_path / "tiny.gguf", fields={"tokenizer.ggml.pre": pre})
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path)
    split = AutoTokenizer.from_pretrained(target).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in split] == expected


def test_a_qwen3_gguf_keeps_its_norms_and_its_own_head_size(tmp_path):
    """transformers' reader takes 128 for every Qwen3, whatever the file says."""
    tensors = _write(tmp_path / "tiny.gguf", architecture="qwen3")
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path)
    model = checkpoint.load(target)
    assert model.config.head_dim == 32
    attention = model.model.layers[0].self_attn
    np.testing.assert_array_equal(attention.q_norm.weight.detach(), tensors["blk.0.attn_q_norm.weight"])
    np.testing.assert_array_equal(attention.k_norm.weight.detach(), tensors["blk.0.attn_k_norm.weight"])
    np.testing.assert_array_equal(attention.q_proj.weight.detach(), tensors["blk.0.attn_q.weight"])
    assert torch.isfinite(_logits(model)).all()


def test_a_mistral_gguf_becomes_a_llama(tmp_path):
    """llama.cpp writes Mistral as llama; transformers has no names for the tensors of one that is called mistral."""
    _write(tmp_path / "tiny.gguf", fields={"general.name": "mistral"})
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path)
    named = _logits(checkpoint.load(target))
    _write(tmp_path / "tiny.gguf")
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path)
    assert torch.equal(_logits(checkpoint.load(target)), named)
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"


def test_an_untied_head_is_read(tmp_path):
    head = np.random.default_rng(1).standard_normal((300, 32)).astype(np.float32)
    _write(tmp_path / "tiny.gguf", extra={"output.weight": head})
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path)
    np.testing.assert_array_equal(checkpoint.load(target).lm_head.weight.detach(), head)


def test_half_precision_is_dequantised_and_stored_in_the_entrys_dtype(tmp_path):
    tensors = _write(tmp_path / "tiny.gguf", dtype=np.float16)
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path, dtype="bfloat16")
    stored = checkpoint.load(target).model.layers[0].mlp.down_proj.weight.detach()
    assert torch.equal(stored, torch.from_numpy(tensors["blk.0.ffn_down.weight"]).bfloat16())


def _divisors(factor, **fields):
    """rope_freqs.weight as llama.cpp writes it: what the base frequencies are divided by."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192} | fields  # fmt: skip
    config = LlamaConfig(**_SIZES, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    return ((1 / 5e5 ** (np.arange(8) / 8)) / scaled.numpy()).astype(np.float32), rope


def test_the_rope_scaling_of_llama_3_1_is_recovered_from_its_divisors(tmp_path):
    divisors, rope = _divisors(8.0)
    assert len(set(divisors.round(3))) > 2  # 1, 8 and something between
    _write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": divisors})
    target, _ = _build(tmp_path / "tiny.gguf", tmp_path)
    assert checkpoint.load(target).config.rope_parameters == rope


def test_a_rope_scaling_that_is_not_understood_is_refused(tmp_path):
    divisors, _ = _divisors(8.0, original_max_position_embeddings=1024)
    _write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": divisors})
    with pytest.raises(sources.SourceError, match="is not the rope scaling of Llama 3"):
        _build(tmp_path / "tiny.gguf", tmp_path)
    _write(tmp_path / "tiny.gguf", fields={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(sources.SourceError, match=r"llama\.rope\.scaling\.type = 'yarn' is not read"):
        _build(tmp_path / "tiny.gguf", tmp_path)


def test_a_truncated_gguf_is_called_damaged(tmp_path):
    _write(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for keep in (10, len(content) // 2, len(content) - 200):
        (tmp_path / "tiny.gguf").write_bytes(content[:keep])
        with pytest.raises(sources.SourceError, match=r"tiny.gguf is damaged or cut short"):
            _build(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.parametrize(
    ("architecture", "tensor", "named"),
    [
        ("llama", "blk.0.ffn_up.weight", r"model\.layers\.0\.mlp\.up_proj\.weight"),
        ("qwen2", "blk.0.attn_k.bias", r"model\.layers\.0\.self_attn\.k_proj\.bias"),
        ("qwen3", "blk.0.attn_q_norm.weight", r"model\.layers\.0\.self_attn\.q_norm\.weight"),
    ],
)
def test_a_gguf_that_lacks_a_tensor_is_refused_by_its_name(tmp_path, architecture, tensor, named):
    _write(tmp_path / "tiny.gguf", architecture=architecture, drop={tensor})
    with pytest.raises(sources.SourceError, match=rf"1 missing \({named}\), 0 unknown"):
        _build(tmp_path / "tiny.gguf", tmp_path)


def test_a_gguf_with_a_tensor_too_many_is_refused_by_its_name(tmp_path):
    _write(tmp_path / "tiny.gguf", extra={"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(sources.SourceError, match=r"1 unknown \(model\.layers\.0\.self_attn\.q_proj\.bias\)"):
        _build(tmp_path / "tiny.gguf", tmp_path)


def test_a_tensor_that_cannot_be_dequantised_is_named_with_its_type(tmp_path):
    _write(tmp_path / "tiny.gguf", extra={"blk.0.ffn_up.weight": np.zeros((64, 32), np.int32)})
    with pytest.raises(sources.SourceError, match=r"blk\.0\.ffn_up\.weight is stored as I32"):
        _build(tmp_path / "tiny.gguf", tmp_path)


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    _write(tmp_path / "tiny.gguf", architecture="gpt2")
    with pytest.raises(sources.SourceError, match="architecture 'gpt2'; supported: llama, qwen2, qwen3"):
        _build(tmp_path / "tiny.gguf", tmp_path)

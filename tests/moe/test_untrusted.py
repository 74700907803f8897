"""What a checkpoint of somebody else may hold that nothing may be made of; each refusal names file, value and fix."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_dense import _build, _edit, _shard

from tasks import settings as knobs
from tasks import sources
from tasks.moe import dense, untrusted

SINGLE = "model.safetensors"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_no_number_is_named_with_its_place(copy_of, tmp_path, name, value):
    tensors = load_file(copy_of / SINGLE)
    tensors[name].view(-1)[5] = value
    save_file(tensors, copy_of / SINGLE)
    with pytest.raises(sources.SourceError, match=rf"{SINGLE}: {name} holds {value} at .*5\], and 1 of .*fetch"):
        _build(copy_of, tmp_path)


def test_a_weight_too_large_for_the_dtype_of_the_settings_is_named_with_the_fix(copy_of, tmp_path):
    tensors = load_file(copy_of / SINGLE)
    tensors["model.norm.weight"][0] = 3.4e38
    save_file(tensors, copy_of / SINGLE)
    with pytest.raises(sources.SourceError, match=r"norm\.weight holds 3.4e\+38, too large for torch\.bfloat16; set"):
        _build(copy_of, tmp_path, dtype="bfloat16")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "index.json holds a JSON list, not an object"),
        ("{", "index.json is not valid JSON"),
        ("[" * 100_000, "index.json is not valid JSON"),
        ("{}", "weight_map is no table"),
        ('{"weight_map": ["a"]}', "weight_map is no table"),
        ('{"weight_map": {"a": 3}}', "weight_map.a = 3 is no safetensors file"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "weight_map.a = '../model.safetensors' is no"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "weight_map.a = '/etc/passwd' is no safetensors file"),
        ('{"weight_map": {"a": "x.bin"}}', "weight_map.a = 'x.bin' is no safetensors file"),
        ('{"weight_map": {"a": "none.safetensors"}}', "lacks none.safetensors"),
    ],
)
def test_an_index_that_makes_no_sense_is_one_line(copy_of, tmp_path, index, message):
    _shard(copy_of)
    (copy_of / untrusted.INDEX).write_text(index)
    with pytest.raises(sources.SourceError, match=message) as refused:
        _build(copy_of, tmp_path)
    assert "\n" not in str(refused.value)


def test_a_tensor_that_stands_in_another_file_than_the_index_says_is_named(copy_of, tmp_path):
    _shard(copy_of)
    path = copy_of / untrusted.INDEX
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(n for n in names if n != index["weight_map"]["model.norm.weight"])
    path.write_text(json.dumps(index))
    with pytest.raises(sources.SourceError, match=r"does not hold model\.norm\.weight, which model.safetensors.index"):
        _build(copy_of, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**6, "num_hidden_layers = 1000000, and the files hold 2 layers, numbered 0 to 1"),
        ("num_hidden_layers", 1, "num_hidden_layers = 1, and the files hold 2 layers"),
        ("hidden_size", 65, r"hidden_size = 65 is no multiple of num_attention_heads = 4"),
        ("num_key_value_heads", 3, "num_attention_heads = 4 is no multiple of num_key_value_heads = 3"),
        ("num_attention_heads", 0, "num_attention_heads = 0; needed: a whole number"),
        ("vocab_size", "512", "vocab_size = '512'; needed: a whole number"),
        ("vocab_size", 10**30, "vocab_size = 1000000000000000000000000000000; needed"),
        ("intermediate_size", 128.5, "intermediate_size = 128.5; needed"),
        ("intermediate_size", True, "intermediate_size = True; needed"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps = nan; needed: a finite number"),
        ("rms_norm_eps", -1.0, "rms_norm_eps = -1.0; needed: a number above 0"),
        ("hidden_act", ["silu"], "config.json"),
        ("model_type", ["llama"], r"model_type = \['llama'\]"),
        ("architectures", "LlamaForCausalLM", "architectures = 'LlamaForCausalLM'"),
        ("quantization_config", "fp8", "quant_method = 'fp8'"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "one table for all layers"),
        ("rope_scaling", "linear", "rope_scaling = 'linear'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5: transformers rotates whole heads in a llama"),
    ],
)
def test_a_config_that_cannot_be_is_one_line_and_takes_no_time(copy_of, tmp_path, field, value, message):
    _edit(copy_of, head_dim=None, **{field: value})
    with pytest.raises(sources.SourceError, match=message) as refused:
        _build(copy_of, tmp_path)
    assert "config.json" in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "hidden_act", "rope_parameters", "rope_scaling", "tie_word_embeddings",
    "model_type", "architectures", "quantization_config", "max_position_embeddings", "attention_bias",
)  # fmt: skip


@given(field=st.sampled_from(FIELDS), value=JSON)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_field_is_built_or_refused_in_one_error(copy_of, tmp_path, field, value):
    raw = (copy_of / "config.json").read_bytes()
    try:
        _edit(copy_of, **{field: value})
        weights = [SINGLE]
        for name in ("model.safetensors", "config.json"):
            (tmp_path / "work/model" / name).unlink(missing_ok=True)
        (tmp_path / "work/model").mkdir(parents=True, exist_ok=True)
        entry = knobs.Model(source=f"dir:{copy_of}", license="MIT")
        dense._convert(copy_of, weights, target=tmp_path / "work/model", entry=entry)
    except ValueError:
        pass
    finally:
        (copy_of / "config.json").write_bytes(raw)


def test_a_gguf_with_a_weight_that_is_no_number_is_refused(tmp_path):
    from test_gguf import _write

    weights = np.ones((64, 32), np.float32)
    weights[3, 4] = math.nan
    _write(tmp_path / "tiny.gguf", extra={"blk.0.ffn_up.weight": weights})
    (tmp_path / "work").mkdir()
    with pytest.raises(sources.SourceError, match=r"tiny\.gguf: blk\.0\.ffn_up\.weight holds nan at \[3, 4\]"):
        dense.build(knobs.Model(source=f"dir:{tmp_path / 'tiny.gguf'}", license="MIT"), tmp_path / "work")

"""The model stage: what it accepts, what it writes, and what it refuses with nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import settings, sources
from tasks.moe import checkpoint, dense


@pytest.fixture
def copy_of(tiny_model, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(tiny_model, folder)
    return folder


def _entry(folder, **fields):
    return settings.Model(source=f"dir:{folder}", license="MIT", **fields)


def _build(folder, tmp_path, **fields):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return work / "model", dense.build(_entry(folder, **fields), work)


def test_a_folder_of_safetensors_keeps_every_weight_and_the_tokenizer(copy_of, tmp_path):
    target, metrics = _build(copy_of, tmp_path)
    before, after = load_file(copy_of / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (target / "tokenizer.json").read_bytes() == (copy_of / "tokenizer.json").read_bytes()
    assert metrics["parameters"]["total"] == sum(tensor.numel() for tensor in before.values())
    assert len(metrics["source_sha256"]) == 64
    assert (target / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_weights_are_stored_in_the_dtype_of_the_settings(copy_of, tmp_path):
    target, _ = _build(copy_of, tmp_path, dtype="bfloat16")
    assert checkpoint.load(target).dtype == torch.bfloat16


def test_a_folder_of_pickles_is_refused_with_the_reason(copy_of, tmp_path):
    (copy_of / "model.safetensors").rename(copy_of / "pytorch_model.bin")
    with pytest.raises(sources.SourceError, match=r"only as pickles \(pytorch_model.bin\), which can run any code"):
        _build(copy_of, tmp_path)


def test_a_folder_without_weights_is_refused(copy_of, tmp_path):
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(sources.SourceError, match="neither safetensors nor GGUF"):
        _build(copy_of, tmp_path)


@pytest.mark.parametrize("keep", [100, 0.5, 0.999])
def test_truncated_safetensors_are_called_damaged(copy_of, tmp_path, keep):
    content = (copy_of / "model.safetensors").read_bytes()
    (copy_of / "model.safetensors").write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(sources.SourceError, match=r"model\.safetensors is damaged or cut short"):
        _build(copy_of, tmp_path)


def test_the_digest_of_a_folder_covers_every_file_in_it(copy_of, tmp_path):
    _, metrics = _build(copy_of, tmp_path)
    _build(copy_of, tmp_path, sha256=metrics["source_sha256"])
    (copy_of / "tokenizer_config.json").write_text("{}")
    with pytest.raises(sources.SourceError, match="sha256 is"):
        _build(copy_of, tmp_path, sha256=metrics["source_sha256"])


def test_a_shape_that_differs_from_the_config_is_listed_field_by_field(copy_of, tmp_path):
    shape = settings.Shape(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    wrong = (
        "intermediate_size = 256 in pipelines.yaml, 128 in config.json; num_hidden_layers = 3 in pipelines.yaml, 2 in"
    )
    with pytest.raises(sources.SourceError, match=wrong):
        _build(copy_of, tmp_path, shape=shape)


def test_another_architecture_is_refused_with_what_is_supported(copy_of, tmp_path):
    config = json.loads((copy_of / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (copy_of / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        sources.SourceError, match=r"two matrices and no gate; supported: llama \(LlamaForCausalLM\), mistral"
    ):
        _build(copy_of, tmp_path)


@pytest.mark.parametrize("change", ["drop", "add"])
def test_a_tensor_too_few_or_too_many_is_named(copy_of, tmp_path, change):
    tensors = load_file(copy_of / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "add":
        name = "model.layers.0.mlp.extra.weight"
        tensors[name] = torch.zeros(1)
    else:
        del tensors[name]
    save_file(tensors, copy_of / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sources.SourceError, match=name):
        _build(copy_of, tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_refused(copy_of, tmp_path):
    for file in copy_of.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(sources.SourceError, match="no tokenizer"):
        _build(copy_of, tmp_path)


def test_the_stage_publishes_checkpoint_and_metrics(tiny_project):
    done = subprocess.run(
        [sys.executable, "-m", "tasks.moe.dense", "tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(Path("data/models/tiny")).config.num_hidden_layers == 2
    assert json.loads(Path("data/models/tiny.json").read_text())["license"] == "PSF-2.0"


def test_a_wrong_sha256_ends_the_stage_with_nothing_written(tiny_project):
    text = Path("pipelines.yaml").read_text()
    Path("pipelines.yaml").write_text(
        text.replace("license: PSF-2.0\n\n", f"license: PSF-2.0\n    sha256: {'f' * 64}\n\n", 1)
    )
    done = subprocess.run(
        [sys.executable, "-m", "tasks.moe.dense", "tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "but pipelines.yaml says ffff" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("data").exists()


def _write_gguf(path, *, drop=(), architecture="llama"):
    """A float32 GGUF of a LLaMA of one layer, hidden 32, FFN 64, 2 heads, a byte-level tokenizer of 300."""
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    tokens = [chr(256 + i) for i in range(299)]
    tokens.append(tokens[0] + tokens[1])  # what the one merge makes
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd.weight": (300, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name not in drop:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_becomes_safetensors_with_the_same_weights(tmp_path):
    tensors = _write_gguf(tmp_path / "tiny.gguf")
    target, metrics = _build(tmp_path / "tiny.gguf", tmp_path)
    model = checkpoint.load(target)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach(), tensors["token_embd.weight"])
    layer = model.model.layers[0]
    np.testing.assert_array_equal(layer.mlp.down_proj.weight.detach(), tensors["blk.0.ffn_down.weight"])
    np.testing.assert_array_equal(layer.self_attn.v_proj.weight.detach(), tensors["blk.0.attn_v.weight"])
    assert metrics["parameters"]["total"] == sum(tensor.size for tensor in tensors.values())


def test_a_truncated_gguf_is_called_damaged(tmp_path):
    _write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for keep in (10, len(content) // 2, len(content) - 200):
        (tmp_path / "tiny.gguf").write_bytes(content[:keep])
        with pytest.raises(sources.SourceError, match=r"tiny.gguf is damaged or cut short"):
            _build(tmp_path / "tiny.gguf", tmp_path)


def test_a_gguf_that_lacks_a_tensor_is_refused_by_its_name(tmp_path):
    _write_gguf(tmp_path / "tiny.gguf", drop={"blk.0.ffn_up.weight"})
    with pytest.raises(sources.SourceError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        _build(tmp_path / "tiny.gguf", tmp_path)


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    _write_gguf(tmp_path / "tiny.gguf", architecture="gpt2")
    with pytest.raises(sources.SourceError, match="architecture 'gpt2'; supported: llama"):
        _build(tmp_path / "tiny.gguf", tmp_path)

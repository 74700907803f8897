"""The model stage: what it accepts, what it writes, and what it refuses with nothing lost."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import settings, sources
from tasks.moe import checkpoint, dense, families, writer
from tests import models, warm_processes


def _entry(folder, **fields):
    return settings.Model(source=f"dir:{folder}", license="MIT", **fields)


def _build(folder, tmp_path, **fields):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return work / "model", dense.build(_entry(folder, **fields), work)


def _edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_of_safetensors_keeps_every_weight_and_the_tokenizer(copy_of, tmp_path):
    target, metrics = _build(copy_of, tmp_path)
    before, after = load_file(copy_of / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (target / "tokenizer.json").read_bytes() == (copy_of / "tokenizer.json").read_bytes()
    assert metrics["parameters"]["total"] == sum(tensor.numel() for tensor in before.values())
    assert len(metrics["source_sha256"]) == 64
    assert (target / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_generation_config_card_and_licence_come_along(copy_of, tmp_path):
    kept = {"generation_config.json": '{"temperature": 0.6}', "README.md": "# Tiny", "LICENSE.txt": "PSF"}
    for name, text in kept.items():
        (copy_of / name).write_text(text)
    target, _ = _build(copy_of, tmp_path)
    assert {name: (target / name).read_text() for name in kept} == kept


def test_weights_are_stored_in_the_dtype_of_the_settings(copy_of, tmp_path):
    target, _ = _build(copy_of, tmp_path, dtype="bfloat16")
    assert checkpoint.load(target).dtype == torch.bfloat16


def _replace(folder, **tensors):
    """Replace tensors of model.safetensors by function of the old ones; where that gives None, one is taken out."""
    stored = load_file(folder / "model.safetensors")
    changed = {name: change(stored.get(name)) for name, change in tensors.items()}
    kept = {name: tensor for name, tensor in (stored | changed).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "neither safetensors nor GGUF"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"only as pickles \(pytorch_model.bin\), which can run any code",
        ),
        (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "no tokenizer"),
        (
            lambda f: _edit(f, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
            r"two matrices and no gate; supported: llama \(LlamaForCausalLM\), mistral",
        ),
        (
            lambda f: _edit(f, architectures=["LlamaForSequenceClassification"]),
            "no causal language model of class LlamaForCausalLM",
        ),
        (
            lambda f: _replace(f, **{"model.norm.weight": lambda w: w[:16].clone()}),
            r"model\.norm\.weight is \[16\], by config\.json \[64\]",
        ),
        (lambda f: _replace(f, **{UP: lambda _: None}), UP),
        (
            lambda f: _replace(f, **{"model.extra": lambda _: torch.zeros(1)}),
            "model.extra",
        ),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_of_a_known_family_is_refused_with_the_reason(
    copy_of, tmp_path, spoil, message
):
    spoil(copy_of)
    with pytest.raises(sources.SourceError, match=message):
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


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma2", "GeGLU"), ("olmo2", "behind the FFN"), ("mixtral", "already"), ("nonesuch", "not known whether")],
)
def test_a_family_that_cannot_be_cut_is_refused_with_the_reason(copy_of, tmp_path, kind, reason):
    _edit(copy_of, architectures=None, model_type=kind)
    with pytest.raises(sources.SourceError, match=rf"model_type = '{kind}'.*{reason}.*supported: llama .*qwen3 \("):
        _build(copy_of, tmp_path)


def test_quantised_weights_are_refused(copy_of, tmp_path):
    _edit(copy_of, quantization_config={"quant_method": "fp8"})
    with pytest.raises(sources.SourceError, match=r"quant_method = 'fp8'.* name the checkpoint that it was made from"):
        _build(copy_of, tmp_path)
    _edit(copy_of, quantization_config=None)
    _replace(copy_of, **{UP: torch.Tensor.char})
    with pytest.raises(sources.SourceError, match=rf"{UP} is stored as I8"):
        _build(copy_of, tmp_path)


_FAMILIES = {
    "llama, 3": {"rope_parameters": models.LLAMA3, "tie_word_embeddings": True},
    "llama, 1": {"num_key_value_heads": 4, "attention_bias": True},
    "mistral": {"sliding_window": 6, "head_dim": 16},
    "qwen2": models.SLIDING,
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_family_comes_out_of_shards_with_its_logits(copy_of, tmp_path, family):
    """Oracle: the source, loaded by transformers."""
    model = models.build(family, **_FAMILIES[family])
    (copy_of / "model.safetensors").unlink()
    model.save_pretrained(copy_of, max_shard_size=20_000)
    assert (copy_of / "model.safetensors.index.json").exists()
    target, metrics = _build(copy_of, tmp_path)
    stored = load_file(target / "model.safetensors")
    assert metrics["parameters"]["total"] == sum(tensor.numel() for tensor in stored.values())
    ids = torch.arange(20)[None] % 64
    with torch.no_grad():
        assert torch.equal(checkpoint.load(target)(input_ids=ids).logits, model(input_ids=ids).logits)


def _shard(folder, *, index=True):
    """Rewrite a checkpoint folder as three shards or more."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with writer.ShardWriter(folder, plan, shard_bytes=150_000) as shards:
        for name, tensor in tensors.items():
            shards.write(name, tensor)
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) >= 3
    return tensors, files


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_with_and_without_an_index(copy_of, tmp_path, index):
    tensors, _ = _shard(copy_of, index=index)
    target, _ = _build(copy_of, tmp_path)
    stored = load_file(target / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_a_shard_that_the_index_lists_and_the_folder_lacks_is_named(copy_of, tmp_path):
    _, files = _shard(copy_of)
    files[1].unlink()
    with pytest.raises(sources.SourceError, match=rf"lacks {files[1].name}, which model\.safetensors\.index\.json"):
        _build(copy_of, tmp_path)


def test_a_shard_that_is_cut_short_is_named(copy_of, tmp_path):
    _, files = _shard(copy_of)
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(sources.SourceError, match=rf"{files[1].name} is damaged or cut short"):
        _build(copy_of, tmp_path)


def test_a_tensor_that_stands_in_two_shards_is_named_with_both(copy_of, tmp_path):
    tensors, _ = _shard(copy_of, index=False)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, copy_of / "extra.safetensors")
    with pytest.raises(sources.SourceError, match=r"model\.norm\.weight twice, in extra\.safetensors and model-0"):
        _build(copy_of, tmp_path)


def test_files_that_transformers_would_not_read_are_left_out(copy_of, tmp_path):
    save_file({"another.name": torch.zeros(1)}, copy_of / "consolidated.safetensors")
    before = load_file(copy_of / "model.safetensors")
    target, _ = _build(copy_of, tmp_path)
    assert load_file(target / "model.safetensors").keys() == before.keys()


def test_a_tied_head_may_be_stored_but_not_another_one(copy_of, tmp_path):
    tensors = load_file(copy_of / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    extra = {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | extra, copy_of / "model.safetensors")
    target, _ = _build(copy_of, tmp_path)
    assert load_file(target / "model.safetensors").keys() == tensors.keys()
    save_file(tensors | {"lm_head.weight": embedding + 1}, copy_of / "model.safetensors")
    with pytest.raises(sources.SourceError, match=r"tie_word_embeddings = true, but lm_head\.weight is not"):
        _build(copy_of, tmp_path)


def test_a_source_folder_is_neither_copied_nor_changed(copy_of, tmp_path):
    before = {path: path.read_bytes() for path in copy_of.iterdir()}
    _build(copy_of, tmp_path)
    assert {path: path.read_bytes() for path in copy_of.iterdir()} == before
    assert not (tmp_path / "work" / "source").exists()


def _peak():
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) << 10


def _build_and_print_memory(source, work):
    before = _peak()
    work.mkdir()
    dense.build(_entry(source), work)
    print(_peak() - before)


def test_memory_stays_near_the_largest_tensor(tmp_path, copy_of):
    """12 layers of 8 MB each: what the stage adds at its peak is far less than the model of 100 MB."""
    (copy_of / "model.safetensors").unlink()
    config = models.config("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=12, vocab_size=512)
    config.save_pretrained(copy_of)
    plan = {name: (torch.float32, shape) for name, shape in families.expected(config).items()}
    with writer.ShardWriter(copy_of, plan, shard_bytes=60_000_000) as shards:
        for name, (_, shape) in plan.items():
            shards.write(name, torch.zeros(shape))
    done = warm_processes.run(_build_and_print_memory, copy_of, tmp_path / "w")
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "w" / "model").glob("*.safetensors"))
    assert size > 90_000_000
    assert int(done.stdout) < size / 2


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_changes_while_it_is_converted_is_refused_by_name(copy_of, tmp_path, monkeypatch, pinned, name):
    """The size and the time of modification stay, and the bytes that were read are back at the end."""
    sha256 = _build(copy_of, tmp_path)[1]["source_sha256"] if pinned else None
    convert = dense._convert

    def meanwhile(*arguments, **more):
        path, content = copy_of / name, (copy_of / name).read_bytes()
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        config = convert(*arguments, **more)
        path.write_bytes(content)
        os.utime(path, ns=times)
        return config

    if name == "tokenizer.json":  # of which a byte cannot be changed at random
        (copy_of / name).write_bytes((copy_of / name).read_bytes() + b" ")
        sha256 = None
    monkeypatch.setattr(dense, "_convert", meanwhile)
    with pytest.raises(sources.SourceError, match=rf"{name} changed while it was read; run again"):
        _build(copy_of, tmp_path, sha256=sha256)


def test_a_hub_model_is_read_where_it_was_downloaded(copy_of, tmp_path, monkeypatch):
    import huggingface_hub

    (copy_of / "consolidated.safetensors").write_bytes(b"left alone")
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(copy_of)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_args, **_: [p.name for p in copy_of.iterdir()]
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    entry = settings.Model(source="hub:org/name@abc", license="MIT")
    (tmp_path / "work").mkdir()
    dense.build(entry, tmp_path / "work")
    assert (asked["name"], asked["revision"]) == ("org/name", "abc")
    assert "*.bin" not in asked["allow_patterns"]
    assert checkpoint.load(tmp_path / "work" / "model").config.num_hidden_layers == 2


def test_the_stage_publishes_checkpoint_and_metrics(tiny_project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dense", "tiny"])
    assert dense.main() == 0
    assert checkpoint.load(Path("data/models/tiny")).config.num_hidden_layers == 2
    assert json.loads(Path("data/models/tiny.json").read_text())["license"] == "PSF-2.0"


def test_a_wrong_sha256_ends_the_stage_with_nothing_written(tiny_project, monkeypatch, capsys):
    text = Path("pipelines.yaml").read_text()
    Path("pipelines.yaml").write_text(
        text.replace("license: PSF-2.0\n\n", f"license: PSF-2.0\n    sha256: {'f' * 64}\n\n", 1)
    )
    monkeypatch.setattr(sys, "argv", ["dense", "tiny"])
    assert dense.main() == 1
    assert "but pipelines.yaml says ffff" in capsys.readouterr().err
    assert not Path("data").exists()

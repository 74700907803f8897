"""Slices against a literal loop, and the bookkeeping of a conversion: nothing lost, nothing twice, same bytes."""

import json

import numpy as np
import pytest
import torch
from dense_models import export
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks import settings
from tasks.moe.streamed import Streamed
from tasks.partition import exporters
from tasks.partition.convert import ffn, moe_writer, slices
from tests import models

OPTIONS = settings.Partition(method="random", experts=6, top_k=2)


def save_dense(folder, **fields):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    models.build("llama", dtype=torch.bfloat16, **sizes, **fields).save_pretrained(folder)
    return folder / "model.safetensors"


def cut(parent, i, *, experts=6):
    index = np.random.default_rng(i).permutation(24)[: experts * 4].reshape(experts, 4)
    router = torch.randn(experts, 16, generator=torch.Generator().manual_seed(i))
    return slices(*ffn(parent, i), index, shared=0, scale=2.0, router_ED=router)


def run(source, target, *, options=OPTIONS, **more):
    parent = Streamed(source)
    export(parent, target, options, layer=lambda i: cut(parent, i), **more)


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.data())
def test_slices_are_the_rows_and_scaled_columns_at_the_index(data):
    shared, experts, size, hidden = (data.draw(st.integers(low, 4)) for low in (0, 1, 1, 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    width = data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    index = rng.integers(0, width, (shared + experts, size)).astype(np.int32)
    generator = torch.Generator().manual_seed(int(rng.integers(99)))
    gate, up = (torch.randn(width, hidden, generator=generator).to(dtype) for _ in range(2))
    down = torch.randn(hidden, width, generator=generator).to(dtype)
    if data.draw(st.booleans()):  # a refitted one is float32
        down = torch.randn(hidden, width, generator=generator)
    router = torch.randn(experts, hidden, generator=generator)
    layer = slices(gate, up, down, index, shared=shared, scale=1.7, router_ED=router, down_dtype=dtype)
    assert torch.equal(layer.router_ED, router.to(dtype))
    assert (layer.shared is not None) == (shared > 0)
    for e, row in enumerate(index):
        for f, neuron in enumerate(row):
            if e < shared:
                place = e * size + f
                rows = layer.shared_gate_MD[place], layer.shared_up_MD[place]
                column, factor = layer.shared_down_DM[:, place], 1.0
            else:
                rows = layer.gate_EFD[e - shared, f], layer.up_EFD[e - shared, f]
                column, factor = layer.down_EDF[e - shared, :, f], 1.7
            assert torch.equal(rows[0], gate[neuron])
            assert torch.equal(rows[1], up[neuron])
            assert torch.equal(column, (down[:, neuron].float() * factor).to(dtype))


def test_the_same_parent_and_experts_give_the_same_bytes_in_shards(tmp_path):
    save_dense(tmp_path / "dense")
    for name in ("first", "second"):
        run(tmp_path / "dense", tmp_path / name, shard_bytes=5000)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 3
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(notes.values())
    assert loaded.dtype == torch.bfloat16


def test_everything_outside_of_the_ffns_is_the_parents_bit_for_bit(tmp_path):
    save_dense(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "moe")
    before, after = Streamed(tmp_path / "dense"), Streamed(tmp_path / "moe")
    kept = {name for name in before.stored if ".mlp." not in name}
    assert kept == {name for name in after.stored if "block_sparse_moe" not in name}
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in kept)


def test_layers_that_are_not_listed_stay_dense(tmp_path):
    save_dense(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "moe", options=OPTIONS.model_copy(update={"layers": [2, 0]}))
    assert json.loads((tmp_path / "moe/config.json").read_text())["mlp_only_layers"] == [1]
    for mine, parents in zip(*(ffn(Streamed(tmp_path / name), 1) for name in ("moe", "dense")), strict=True):
        assert torch.equal(mine, parents)


def test_tokenizer_generation_config_model_card_and_licence_come_along(tmp_path):
    save_dense(tmp_path / "dense")
    names = ("tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
    for name in names:
        (tmp_path / "dense" / name).write_text("{}" if name.endswith(".json") else name)
    (tmp_path / "dense" / "model.py").write_text("raise SystemExit")
    run(tmp_path / "dense", tmp_path / "moe")
    assert {file.name for file in (tmp_path / "moe").iterdir()} == {
        *names,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert (tmp_path / "moe" / "NOTICE").read_text() == "NOTICE"
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["MixtralForCausalLM"], "bfloat16")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "x"])
def test_a_tensor_without_a_place_in_the_result_stops_the_conversion(name, tmp_path):
    path = save_dense(tmp_path / "dense")
    save_file(load_file(path) | {name: torch.ones(16)}, path)
    with pytest.raises(
        ValueError, match=rf"a mixtral of this config.json has no place for these tensors: \['{name}'\]"
    ):
        run(tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_the_parent_lacks_stops_the_conversion(name, tmp_path):
    path = save_dense(tmp_path / "dense")
    content = load_file(path)
    del content[name]
    save_file(content, path)
    with pytest.raises(ValueError, match=rf"tensors of a llama are missing: \['{name}'\]"):
        run(tmp_path / "dense", tmp_path / "moe")


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    path = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    run(tmp_path / "dense", tmp_path / "without")
    assert "lm_head.weight" not in Streamed(tmp_path / "without").stored
    content = load_file(path)
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}, path)
    run(tmp_path / "dense", tmp_path / "with")
    assert "lm_head.weight" in Streamed(tmp_path / "with").stored


def test_two_tensors_at_one_name_stop_the_conversion(tmp_path):
    class Clash(type(exporters.EXPORTERS["mixtral"])):
        def carried(self, dense, names):
            return super().carried(dense, names) | {"model.norm.weight": "model.embed_tokens.weight"}

    save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"two tensors would have one name: \['model.embed_tokens.weight'\]"):
        run(tmp_path / "dense", tmp_path / "moe", exporter=Clash())


def test_a_layer_of_another_shape_than_planned_or_a_missing_one_stops_the_conversion(tmp_path):
    save_dense(tmp_path / "dense")
    parent = Streamed(tmp_path / "dense")
    exporter = exporters.choose(parent.config, OPTIONS)
    writer = moe_writer(parent, tmp_path / "moe", exporter=exporter, partition=OPTIONS)
    with (
        pytest.raises(ValueError, match=r"block_sparse_moe.gate.weight' is torch.bfloat16 \[5, 16\], planned as"),
        writer as write,
    ):
        write(0, cut(parent, 0, experts=5))
    writer = moe_writer(parent, tmp_path / "missing", exporter=exporter, partition=OPTIONS)
    with pytest.raises(ValueError, match=r"57 tensors were not written"), writer as write:
        pass


def test_a_result_is_never_written_over_another(tmp_path):
    save_dense(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "moe")
    with pytest.raises(FileExistsError):
        run(tmp_path / "dense", tmp_path / "moe")

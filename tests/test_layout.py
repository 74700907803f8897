"""The text tower of a larger model becomes sparse by the code that converts a text model; the rest is carried."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import layout
from tasks.layout import Layout
from tasks.moe.streamed import Streamed
from tasks.partition import convert, exporters
from tasks.settings import Partition
from tests import models

TOWERS = {
    "transformers 5": Layout(body="model.language_model.", config="text_config"),
    "published": Layout(body="language_model.model.", head="language_model.lm_head.", config="text_config"),
}
VISION = {
    "model.vision_tower.layers.0.weight": torch.arange(12, dtype=torch.float16).view(3, 4),
    "multi_modal_projector.linear_1.bias": torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
}


def converted(parent, folder, partition):
    """The tensors and the config that the conversion with the experts in order of the neurons writes."""
    exporter = exporters.choose(parent.config, partition)
    width = parent.config.intermediate_size
    experts_EF = torch.arange(width).view(partition.experts, -1).numpy()
    with convert.moe_writer(parent, folder, exporter=exporter, partition=partition) as write:
        for i in range(parent.layers):
            write(i, convert.slices(*convert.ffn(parent, i), experts_EF, shared=0, scale=2.0))
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_is_converted_as_the_same_text_model_and_other_tensors_keep_their_bytes(kind, tmp_path):
    names = TOWERS[kind]
    text, whole = tmp_path / "text", tmp_path / "whole"
    models.build("llama").save_pretrained(text)
    tensors = load_file(text / "model.safetensors")
    whole.mkdir()
    save_file({names.on_disk(name): tensor for name, tensor in tensors.items()} | VISION, whole / "model.safetensors")
    fields = json.loads((text / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "llava", "image_token_id": 3, "text_config": fields}))

    partition = Partition(method="random", experts=4, top_k=2)
    expected, config = converted(Streamed(text), tmp_path / "moe", partition)
    result, larger = converted(Streamed(whole, names=names), tmp_path / "moe tower", partition)

    same = {names.on_disk(name): tensor for name, tensor in expected.items()} | VISION
    assert result.keys() == same.keys()
    for name, tensor in same.items():
        assert result[name].dtype == tensor.dtype
        assert result[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name
    assert larger["text_config"] == config
    assert (larger["model_type"], larger["image_token_id"]) == ("llava", 3)
    again = Streamed(tmp_path / "moe tower", names=names)
    assert torch.equal(again.block(0).mlp.gate.weight, Streamed(tmp_path / "moe").block(0).mlp.gate.weight)


def test_the_text_model_of_a_tower_has_the_losses_of_the_same_text_model(tmp_path):
    names = TOWERS["published"]
    text, whole = tmp_path / "text", tmp_path / "whole"
    models.build("llama").save_pretrained(text)
    whole.mkdir()
    tensors = load_file(text / "model.safetensors")
    save_file({names.on_disk(name): tensor for name, tensor in tensors.items()} | VISION, whole / "model.safetensors")
    fields = json.loads((text / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": fields}))
    ids_BL = torch.arange(24).view(2, 12).numpy()
    nll_B = Streamed(whole, names=names).nll(ids_BL, batch=2)
    assert nll_B.tolist() == Streamed(text).nll(ids_BL, batch=2).tolist()


@pytest.mark.parametrize("name", [layout.EMBEDDINGS, layout.NORM, layout.HEAD, *layout.ffn(7)])
@pytest.mark.parametrize("names", [layout.TEXT, *TOWERS.values()])
def test_a_name_on_disk_leads_back_to_the_name_in_the_text_model(names, name):
    assert names.in_text(names.on_disk(name)) == name


def test_the_vision_tower_is_outside():
    assert all(names.in_text(name) is None for names in TOWERS.values() for name in VISION)


def test_only_tensors_of_decoder_layers_have_a_layer():
    assert [layout.layer_of(name) for name in (layout.ffn(11)[0], layout.NORM, layout.HEAD)] == [11, None, None]

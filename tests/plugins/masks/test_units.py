"""Which units are kept, and that every tensor of every dense class has known axes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import architectures
from tasks.moe import families
from tasks.moe.streamed import Streamed
from tasks.plugins.masks import hard_concrete, module, units
from tests import models

OWN = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48, "hidden_size": 32}
SHAPE = {"num_hidden_layers": 1, "num_key_value_heads": 1, "intermediate_size": 20, "hidden_size": 24}


@pytest.mark.parametrize("kind", architectures.DENSE)
def test_the_axes_of_every_tensor_are_known(kind):
    fields = {row.bias_field: True} if (row := architectures.DENSE[kind]).bias_field else {}
    for name, shape in families.expected(models.config(kind, **fields)).items():
        assert len(units.axes(name)) == len(shape), name
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra\.weight: its axes are not known"):
        units.axes("model.layers.0.extra.weight")


def test_random_units_are_as_many_as_the_shape_has_and_others_with_another_seed():
    config = models.config("llama")
    keep = units.random(config, SHAPE, seed=1)
    counts = {name: (mask != 0).sum(-1).flatten().tolist() for name, mask in vars(keep).items()}
    assert counts == {"layer_L": [1], "group_LK": [1, 1], "neuron_LN": [20, 20], "hidden_D": [24]}
    assert not torch.equal(units.random(config, SHAPE, seed=2).neuron_LN, keep.neuron_LN)
    assert units.random(config, OWN | {"hidden_size": 24}, seed=1).layer_L is None


def test_magnitude_keeps_the_units_whose_weights_are_larger(tmp_path):
    models.build("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for i, neuron in ((0, 5), (1, 40)):
        weights[f"model.layers.{i}.mlp.down_proj.weight"][:, neuron] += 9
    weights["model.layers.0.self_attn.v_proj.weight"][8:] += 9  # the second head of keys and values
    weights["model.layers.1.self_attn.q_proj.weight"][:16] += 9  # the queries of the first
    weights["model.embed_tokens.weight"][:, 30] += 9
    weights["model.layers.1.self_attn.o_proj.weight"] += 9
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    few = {"num_hidden_layers": 1, "num_key_value_heads": 1, "intermediate_size": 1, "hidden_size": 1}
    keep = units.magnitude(Streamed(tmp_path), few)
    assert keep.neuron_LN.argmax(-1).tolist() == [5, 40]
    assert keep.group_LK.tolist() == [[0, 1], [1, 0]]
    assert keep.hidden_D.argmax().item() == 30
    assert keep.layer_L.tolist() == [0, 1]


def test_learned_units_are_those_with_the_largest_logits_with_their_factors(tmp_path):
    logits = torch.linspace(-6, 6, 32)
    module.write(tmp_path, {"hidden_D": logits})
    keep = units.learned(tmp_path, SHAPE)
    bounded = logits.clamp(hard_concrete.SMALLEST, hard_concrete.LARGEST)
    assert keep.layer_L is keep.group_LK is keep.neuron_LN is None
    assert torch.equal(keep.hidden_D, hard_concrete.factor(bounded) * (torch.arange(32) >= 8))

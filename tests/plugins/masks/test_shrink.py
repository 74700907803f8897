"""The physical cut against transformers: a model under masks, and the checkpoint that the masks leave."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks import architectures
from tasks.moe.streamed import Streamed
from tasks.partition import identity
from tasks.plugins.masks import masked, shrink, units
from tasks.plugins.masks.masked import Keep
from tests import models

OWN = {"num_hidden_layers": 3, "num_key_value_heads": 4, "hidden_size": 32, "intermediate_size": 48}
SIZES = OWN | {"num_attention_heads": 8, "max_position_embeddings": 128}
KINDS = {
    "llama": {},
    "llama, tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral, window": {"sliding_window": 16},
    "qwen2, tied, sliding": {"tie_word_embeddings": True, **models.SLIDING, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "granite, tied": {"tie_word_embeddings": True, **models.GRANITE},
}
SHAPES = {
    "layers": {"num_hidden_layers": 2},
    "groups of heads": {"num_key_value_heads": 2},
    "neurons": {"intermediate_size": 20},
    "hidden dimensions": {"hidden_size": 24},
    "heads and hidden dimensions in step": {"num_key_value_heads": 2, "hidden_size": 16},
    "all": {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 20, "hidden_size": 16},
}


@pytest.fixture(autouse=True)
def text(monkeypatch):
    """Random tokens instead of the identity test's text: the tiny models have no tokenizer."""
    monkeypatch.setattr(identity, "sample_ids", lambda _: torch.randint(0, 64, (2, 40)).numpy())


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("parents")
    for number, (kind, fields) in enumerate(KINDS.items()):
        models.build(kind, **SIZES | fields).save_pretrained(folder / str(number))
    return {kind: folder / str(number) for number, kind in enumerate(KINDS)}


def soft(keep):
    """The same units, with a factor of its own for each."""
    generator = torch.Generator().manual_seed(3)
    return Keep(
        **{
            name: None if mask is None else mask * (0.5 + torch.rand(mask.shape, generator=generator) / 2)
            for name, mask in vars(keep).items()
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_model_computes_what_its_cut_checkpoint_does_for_every_kind_of_unit(tmp_path, parents, kind):
    ids = torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(5))
    in_step = not architectures.DENSE[kind.partition(",")[0]].head_dim
    for what, shape in SHAPES.items():
        if in_step and what in ("groups of heads", "hidden dimensions"):
            continue  # which the class cannot hold
        source, sizes = Streamed(parents[kind]), OWN | shape
        keep = soft(units.random(source.config, sizes, seed=7))
        folder, told = tmp_path / what, []
        made = shrink.cut(source, keep, sizes, folder=folder, report=told.append)
        assert len(told) == sizes["num_hidden_layers"]
        assert made["identity_error"] <= 1e-5
        child = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        parent = AutoModelForCausalLM.from_pretrained(parents[kind], dtype=torch.float32).eval()
        assert type(child) is type(parent)
        for field, size in (sizes | {"num_attention_heads": 2 * sizes["num_key_value_heads"]}).items():
            assert getattr(child.config, field) == size, (what, field)
        assert architectures.head_dim(child.config) == architectures.head_dim(parent.config)
        tied = child.config.tie_word_embeddings
        assert tied == (child.lm_head.weight is child.model.embed_tokens.weight)
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
        masked.attach(parent, lambda keep=keep: keep)
        with torch.no_grad():
            given, wanted = child(input_ids=ids).logits, parent(input_ids=ids).logits
        assert ((given - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5, what


def test_the_layers_that_stay_keep_their_kind_of_attention(tmp_path, parents):
    source = Streamed(parents["qwen2, tied, sliding"])
    assert source.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    keep = Keep(layer_L=torch.tensor([0.0, 1.0, 1.0]))
    shrink.cut(source, keep, OWN | {"num_hidden_layers": 2}, folder=tmp_path / "pruned", report=print)
    config = Streamed(tmp_path / "pruned").config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.max_window_layers == 1


def test_a_child_of_other_weights_is_refused_by_its_proof(tmp_path, parents):
    source = Streamed(parents["llama"])
    keep = units.random(source.config, OWN | SHAPES["all"], seed=0)
    folder = tmp_path / "pruned"
    shrink.cut(source, keep, OWN | SHAPES["all"], folder=folder, report=print)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file(weights | {name: weights[name] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(identity.IdentityError, match=r"differ from those of the masked parent by .* allowed: 1e-05"):
        shrink.prove(Streamed(folder), shrink.Folded(source, keep))


def test_factors_are_folded_into_a_bfloat16_parent_and_the_child_is_proved_as_one(tmp_path):
    models.build("llama", **SIZES, dtype=torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    source = Streamed(tmp_path / "dense")
    keep = soft(units.random(source.config, OWN | SHAPES["all"], seed=0))
    made = shrink.cut(source, keep, OWN | SHAPES["all"], folder=tmp_path / "pruned", report=print)
    assert made["identity_error"] <= 1e-5
    assert {value.dtype for value in load_file(tmp_path / "pruned/model.safetensors").values()} == {torch.bfloat16}

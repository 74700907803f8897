"""Counts from the config alone, against the built model and PyTorch's own FLOP counter."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GraniteMoeSharedConfig, LlamaConfig, MixtralConfig

from tasks import settings
from tasks.moe import counts

_SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([32, 64]),
        "intermediate_size": st.sampled_from([16, 40]),
        "num_hidden_layers": st.integers(1, 2),
        "num_attention_heads": st.just(4),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "vocab_size": st.sampled_from([64, 101]),
        "tie_word_embeddings": st.booleans(),
    }
)
_MOE = st.fixed_dictionaries({"num_local_experts": st.integers(2, 5), "num_experts_per_tok": st.integers(1, 2)})


def _configs(sizes, moe, *, bias, shared, head_dim):
    return [
        LlamaConfig(**sizes, attention_bias=bias, mlp_bias=bias, head_dim=head_dim),
        MixtralConfig(**sizes, **moe, head_dim=head_dim),
        GraniteMoeSharedConfig(**sizes, **moe, attention_bias=bias, shared_intermediate_size=shared),
    ]


@given(_SIZES, _MOE, st.booleans(), st.sampled_from([0, 24]), st.sampled_from([8, 24]))
@hypothesis_settings(max_examples=12, deadline=None)
def test_total_is_the_number_of_elements_of_the_built_model(sizes, moe, bias, shared, head_dim):
    for config in _configs(sizes, moe, bias=bias, shared=shared, head_dim=head_dim):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found = counts.parameters(config)
        assert found["total"] == sum(p.numel() for p in model.parameters())
        router = sum(p.numel() for n, p in model.named_parameters() if n.endswith((".gate.weight", ".router.weight")))
        assert found["router"] == router
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        assert found["experts"] == experts
        assert found == counts.parameters(config.to_dict())


@given(_SIZES, _MOE)
@hypothesis_settings(max_examples=6, deadline=None)
def test_a_model_that_chooses_all_experts_has_all_its_parameters_active(sizes, moe):
    config = MixtralConfig(**sizes, **{**moe, "num_experts_per_tok": moe["num_local_experts"]})
    found = counts.parameters(config)
    assert found["active"] == found["total"]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["llama", "mixtral", "granitemoeshared"])
def test_forward_flops_agree_with_pytorchs_counter_within_2_percent(kind):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "attn_implementation": "eager",
    }
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    shapes = [
        LlamaConfig(**sizes),
        MixtralConfig(**sizes, **moe),
        GraniteMoeSharedConfig(**sizes, **moe, shared_intermediate_size=32),
    ]
    model = AutoModelForCausalLM.from_config(shapes[kind])
    ids = torch.arange(50)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    expected = counts.flops_per_token(shapes[kind], seq_len=50)
    assert counter.get_total_flops() == pytest.approx(expected["forward"] * 50, rel=0.02)
    assert expected["train"] == 3 * expected["forward"]


def test_a_shape_in_the_settings_gives_the_config_with_its_counts():
    shape = settings.Shape(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    assert counts.parameters(counts.dense_config(shape))["total"] == 134_515_008


def test_an_unknown_model_type_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="'gpt2' is not counted; known: llama, mixtral, granitemoeshared"):
        counts.parameters({"model_type": "gpt2", "hidden_size": 1, "intermediate_size": 1, "num_attention_heads": 1})

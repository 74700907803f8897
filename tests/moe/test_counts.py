"""Counts from the config alone, against the built model and PyTorch's own FLOP counter."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import architectures, settings
from tasks.moe import counts
from tests import models

_SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([32, 64]),
        "intermediate_size": st.sampled_from([16, 40]),
        "num_hidden_layers": st.integers(1, 4),
        "num_attention_heads": st.just(4),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "vocab_size": st.sampled_from([64, 101]),
        "tie_word_embeddings": st.booleans(),
    }
)
_MOE = st.fixed_dictionaries({"experts": st.integers(2, 5), "top_k": st.integers(1, 2)})
_PLACES = st.fixed_dictionaries(
    {"mlp_only_layers": st.lists(st.integers(0, 3), max_size=2), "decoder_sparse_step": st.integers(1, 2)}
)


def _configs(sizes, moe, *, bias=False, shared=24, head_dim=8, places=None):
    """One config of every class, by model_type."""
    configs = {}
    for kind, row in architectures.ALL.items():
        own = models.own_fields(kind, **moe, expert_size=24, shared_size=shared, bias=bias, places=places)
        default = AutoConfig.for_model(kind)
        own |= {"head_dim": head_dim} if hasattr(default, "head_dim") or row.qk_norm else {}
        own |= {"mlp_bias": bias} if hasattr(default, "mlp_bias") else {}
        configs[kind] = AutoConfig.for_model(kind, **sizes, **own)
    return configs


@given(_SIZES, _MOE, st.booleans(), st.sampled_from([0, 24]), st.sampled_from([8, 24]), _PLACES)
@hypothesis_settings(max_examples=6, deadline=None)
def test_total_is_the_number_of_elements_of_the_built_model(sizes, moe, bias, shared, head_dim, places):
    configs = _configs(sizes, moe, bias=bias, shared=shared, head_dim=head_dim, places=places)
    for kind, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        numel = {name: p.numel() for name, p in model.named_parameters()}
        counted = counts.parameters(config)
        routers = (".gate.weight", ".router.weight", "shared_expert_gate.weight")
        assert counted["total"] == sum(numel.values()), kind
        assert counted["router"] == sum(n for name, n in numel.items() if name.endswith(routers)), kind
        assert counted["experts"] == sum(n for name, n in numel.items() if ".experts." in name), kind
        assert counted["shared"] == sum(
            n for name, n in numel.items() if ".shared_mlp." in name or ".shared_expert." in name
        )
        ffn = (".mlp.", ".block_sparse_moe.", ".shared_mlp.")
        assert counted["ffn"] + counted["router"] == sum(n for name, n in numel.items() if any(f in name for f in ffn))
        assert counted == counts.parameters(config.to_dict()), kind


@given(_SIZES, _MOE, st.sampled_from([0, 24]), _PLACES)
@hypothesis_settings(max_examples=4, deadline=None)
def test_experts_are_those_of_the_built_model_under_whatever_names_its_config_has(sizes, moe, shared, places):
    for kind, config in _configs(sizes, moe, shared=shared, places=places).items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        blocks = {
            layer: block
            for layer, whole in enumerate(model.model.layers)
            for block in whole.modules()
            if type(block).__name__.endswith("Experts")
        }
        counted = counts.experts(config)
        assert counted["layers"] == list(blocks), kind
        for block in blocks.values():
            assert block.gate_up_proj.shape[:2] == (counted["experts"], 2 * counted["expert_size"]), kind
            assert counted["top_k"] == moe["top_k"]
        if kind in architectures.DENSE:
            assert counted == {"layers": [], "experts": 0, "top_k": 0, "expert_size": 0, "shared_size": 0}
        else:
            assert counted["shared_size"] == (shared if architectures.SPARSE[kind].shared_size else 0)


@given(_SIZES, _MOE, _PLACES)
@hypothesis_settings(max_examples=3, deadline=None)
def test_a_model_that_chooses_all_experts_has_all_its_parameters_active(sizes, moe, places):
    for kind, config in _configs(sizes, {**moe, "top_k": moe["experts"]}, places=places).items():
        counted = counts.parameters(config)
        assert counted["active"] == counted["total"], kind


@pytest.mark.parametrize("kind", architectures.ALL)
def test_forward_flops_agree_with_pytorchs_counter_within_2_percent(kind):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    sizes = models.SIZES | {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 96} | eager
    config = _configs(sizes, {"experts": 4, "top_k": 2}, head_dim=16, places={"mlp_only_layers": [1]})[kind]
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(50)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    expected = counts.flops_per_token(config, seq_len=50)
    assert counter.get_total_flops() == pytest.approx(expected["forward"] * 50, rel=0.02)
    assert expected["train"] == 3 * expected["forward"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "qwen2_moe", "granitemoeshared"])
def test_flops_of_training_of_a_prompt_and_of_decoding_agree_with_pytorchs_counter_within_2_percent(kind):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    sizes = models.SIZES | {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96} | eager
    config = _configs(sizes, {"experts": 4, "top_k": 2}, head_dim=16)[kind]
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(40)[None]
    with FlopCounterMode(display=False) as training:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = counts.flops_per_token(config, seq_len=40)["train"]
    assert training.get_total_flops() == pytest.approx(expected * 40, rel=0.02)
    with torch.no_grad():
        with FlopCounterMode(display=False) as prompt:
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        with FlopCounterMode(display=False) as decoding:
            model(ids[:, :1], None, None, cache, use_cache=True)  # the cache's name has changed in 5.23
    assert prompt.get_total_flops() == pytest.approx(counts.prompt_flops(config, tokens=40), rel=0.02)
    assert decoding.get_total_flops() == pytest.approx(counts.decode_flops(config, context=40), rel=0.02)


def _artetxe(layers, hidden, *, ffn, sparse):
    """FLOPs of training a GPT-3 shape on 300B tokens with gradient checkpointing, without those of its routers."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 8, "num_key_value_heads": 8}
    sizes |= {"head_dim": hidden // 8, "vocab_size": 51200, "intermediate_size": ffn}
    experts = {"num_experts": 512, "num_experts_per_tok": 2, "moe_intermediate_size": ffn, "decoder_sparse_step": 2}
    config = AutoConfig.for_model("qwen3_moe" if sparse else "llama", **sizes, **(experts if sparse else {}))
    token = counts.flops_per_token(config, seq_len=2048)["train"] - 8 * counts.parameters(config)["router"]
    return 300 * 10**9 * (token + counts.recomputed_flops_per_token(config, seq_len=2048))


@pytest.mark.parametrize(("layers", "hidden", "published"), [(12, 768, 0.365), (32, 4096, 17.128)])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "top 2 in every other layer"])
def test_training_cost_is_that_of_the_formula_of_artetxe_et_al(layers, hidden, published, sparse):
    # Two matrices of 4 h are three of 8/3 h, which is a whole number for some: FLOPs are linear in it.
    m = Fraction(4, 3) if sparse else 1
    shape = m + Fraction(2048, 6 * hidden) + Fraction(51200, 16 * layers * hidden)
    expected = 96 * 300 * 10**9 * layers * hidden**2 * shape
    low, third = divmod(8 * hidden, 3)
    narrow, wide = (_artetxe(layers, hidden, ffn=low + more, sparse=sparse) for more in (0, 1))
    assert narrow + Fraction(third, 3) * (wide - narrow) == expected
    if not sparse:
        assert float(expected / 10**21) == pytest.approx(published, abs=5e-4)


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
    assert counts.parameters(shape.model_dump(exclude_none=True))["total"] == 134_515_008


def test_an_unknown_model_type_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"'gpt2' is not known here; known: llama, mistral, .*qwen3_moe"):
        counts.parameters({"model_type": "gpt2"})

"""An elastic model at every top_k that it serves: loss, and the rows of the table."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from tasks.evaluate import likelihood
from tasks.evaluate.speeds import speed_table
from tasks.moe import counts, routing

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "norm_topk_prob": False, "initializer_range": 0.5,
}  # fmt: skip


def model(**fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(**SIZES | fields), experts_implementation="eager"
    ).eval()  # fmt: skip


def test_each_value_is_measured_as_a_model_that_loads_with_it_and_the_usual_one_is_back_afterwards():
    windows = {"prose": np.random.default_rng(0).integers(0, 64, (3, 12))}
    elastic = model(elastic_top_k=[1, 2, 4])
    found = likelihood.by_top_k(elastic, windows, batch=2)
    assert list(found) == ["1", "2", "4"]
    for top_k, each in found.items():
        loaded = model(num_experts_per_tok=int(top_k))
        assert each["nats"] == likelihood.measure(loaded, windows, batch=2)["nats"]
        assert each["active"] == counts.parameters(loaded.config)["active"]
        assert each["flops_per_token"] == counts.flops_per_token(loaded.config, seq_len=12)["forward"]
    assert {router.top_k for router in routing.routers(elastic)} == {elastic.config.num_experts_per_tok} == {2}
    assert likelihood.by_top_k(model(), windows, batch=2) == {}


def test_the_table_has_the_speeds_at_other_values_beside_the_parents():
    def of(rate, ratio=None):
        spread = {what: {"median": rate} for what in ("prompt", "decode")}
        return spread | ({"ratio": {what: {"median": ratio} for what in spread}} if ratio else {})

    row = {"engine": "llama.cpp", "dtype": "Q8_0", "threads": 1, "device": "cpu", "models": {"dense": of(50.0)}}
    measured = {"engines": [row | {"elastic": {"4": {"trained": of(60.0, 1.2)}}}]}
    assert speed_table.by_top_k(measured, ["dense", "split", "trained"]) == [
        (f"tokens/s, {what}, top_k 4: llama.cpp Q8_0, 1 thread", ["50", "–", "60 (1.20 ×)"])
        for what in ("prompt", "decode")
    ]

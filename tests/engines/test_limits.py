"""The table of engines: what is refused, with the reason; what is slow; and that the documentation shows it."""

import re
from pathlib import Path

import pytest
import torch

from tasks import architectures
from tasks.engines import limits, table
from tests import models

ROOT = Path(__file__).parent.parent.parent
SIZES = {"hidden_size": 64, "max_position_embeddings": 64}
WIDE = {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
GOOD = {
    "mixtral": WIDE,
    "granitemoeshared": WIDE | {"shared_intermediate_size": 128},
    "granitemoe": WIDE,
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 8, "qkv_bias": True},
    "qwen3_moe": QWEN,
}


def config(kind, **fields):
    return models.config(kind, **SIZES | GOOD[kind] | fields)


@pytest.mark.parametrize("kind", architectures.SPARSE)
@pytest.mark.parametrize("engine", table.ENGINES)
def test_every_engine_loads_and_runs_well_a_plain_model_of_every_class(engine, kind):
    plain = config(kind)
    assert limits.check(engine, plain) == ""
    assert limits.slow(engine, plain) == ""
    assert limits.context(engine, plain) == 64


@pytest.mark.parametrize(
    ("engine", "kind", "fields", "reason"),
    [
        ("vllm", "granitemoe", {"attention_bias": True}, "no bias on the attention's q, k, v, o in a granitemoe"),
        ("sglang", "granitemoeshared", {"attention_bias": True}, "says nothing of it"),
        ("vllm", "qwen3_moe", {"attention_bias": True}, "no bias on the attention's o in a qwen3_moe"),
        ("llama.cpp", "qwen3_moe", {"attention_bias": True}, "no bias on the attention's o in a qwen3_moe"),
        ("vllm", "qwen2_moe", {"qkv_bias": False}, "leaves the biases of q, k and v uninitialised"),
        ("vllm", "granitemoe", {"head_dim": 24}, "head_dim = 24; it takes hidden / heads = 16"),
        ("sglang", "mixtral", {"head_dim": 24}, "head_dim = 24"),
        ("transformers4", "qwen2_moe", {"head_dim": 24}, "head_dim = 24"),
        ("sglang", "mixtral", {"tie_word_embeddings": True}, "leaves the head of a mixtral uninitialised"),
        ("sglang", "granitemoe", {"rope_parameters": models.LLAMA3}, "rope scaling 'llama3' .* has default there"),
        ("vllm", "mixtral", {"rope_parameters": models.DYNAMIC}, "has default, linear, yarn, llama3 there"),
        ("llama.cpp", "qwen3_moe", {"rope_parameters": models.LLAMA3}, "has default, linear, yarn there"),
        (
            "llama.cpp",
            "mixtral",
            {"rope_parameters": models.YARN | {"truncate": False}},
            "truncate = False; .* has True",
        ),
        (
            "llama.cpp",
            "qwen3_moe",
            {"rope_parameters": models.YARN | {"beta_fast": 8.0}},
            "beta_fast = 8.0; .* has 32",
        ),
        (
            "sglang",
            "qwen3_moe",
            {"rope_parameters": models.YARN | {"attention_factor": 1.0}},
            "attention_factor = 1.0; .* none",
        ),
        ("llama.cpp", "qwen3_moe", {"mlp_only_layers": [1]}, "1 of 2 layers are dense; .*partition.layers: all"),
        ("sglang", "qwen2_moe", {"mlp_only_layers": [1]}, "1 of 2 layers are dense"),
        ("llama.cpp", "qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("llama.cpp", "qwen2_moe", {"shared_expert_intermediate_size": 128}, "training moves it; .*shared_experts: 0"),
        ("llama.cpp", "mixtral", {"num_local_experts": 1025}, "1025 experts; at most 1024"),
        (
            "llama.cpp",
            "mixtral",
            {"num_hidden_layers": 30, "num_local_experts": 32, "num_experts_per_tok": 19},
            "19 chosen experts in 30 layers; at most 18",
        ),
        ("transformers", "mixtral", {"intermediate_size": 6}, "6 neurons .* 24 bytes, .* a multiple of 4 neurons"),
        ("transformers", "mixtral", {"intermediate_size": 12, "dtype": torch.bfloat16}, "a multiple of 8 neurons"),
        ("llama.cpp", "granitemoe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_what_an_engine_cannot_compute_is_named_and_transformers_5_computes_it(engine, kind, fields, reason):
    assert re.search(reason, limits.check(engine, config(kind, **fields)))
    if engine != "transformers" and "hidden_act" not in fields:
        assert limits.check("transformers", config(kind, **fields)) == ""


@pytest.mark.parametrize(
    ("engine", "fields", "reason"),
    [
        ("llama.cpp", {"intermediate_size": 48}, "narrow: .* 0.73 x .*; 48 neurons are no multiple of 32: in Q8_0"),
        ("llama.cpp", {"num_local_experts": 32, "num_experts_per_tok": 17}, "17 chosen experts are more than 16"),
        ("vllm", {"intermediate_size": 96}, "96 neurons are no multiple of 64"),
        ("sglang", {"intermediate_size": 96}, "96 neurons are no multiple of 64"),
        ("transformers", {"intermediate_size": 32}, "0.70 x with 64"),
    ],
)
def test_what_is_slow_is_named_with_a_figure(engine, fields, reason):
    slow = config("granitemoe", **fields)
    assert limits.check(engine, slow) == ""
    assert re.search(reason, limits.slow(engine, slow))


def test_a_window_that_an_engine_does_not_have_limits_the_text():
    same, some = config("mixtral", sliding_window=8), config("qwen2_moe", **models.SLIDING)
    by_engine = {engine: (limits.context(engine, same), limits.context(engine, some)) for engine in table.ENGINES}
    assert by_engine == {
        "llama.cpp": (8, 8),
        "vllm": (64, 8),
        "sglang": (8, 8),
        "transformers": (64, 64),
        "transformers4": (64, 8),
    }


def test_a_dense_model_is_refused_by_llama_cpp_alone_and_never_slow():
    dense = models.config("qwen3", attention_bias=True)
    assert "no bias on the attention's o" in limits.check("llama.cpp", dense)
    for engine in ("vllm", "sglang", "transformers"):
        assert limits.check(engine, dense) == limits.slow(engine, dense) == ""


def test_the_documentation_shows_the_table():
    text = (ROOT / "docs/model.md").read_text()
    titles = " | ".join(row.title for row in table.ENGINES.values())
    assert f"| class | {titles} |" in text
    for kind in architectures.SPARSE:
        assert f"| `{kind}` | {' | '.join(table.describe(engine, kind) for engine in table.ENGINES)} |" in text
    for name, row in table.ENGINES.items():
        assert f"| `{name}` | {row.title} {row.version} | " in text
        assert f" | {row.fast_experts} |" in text
        for why in filter(None, (row.narrow_why, row.blocks_why, row.chosen_why)):
            assert why in text

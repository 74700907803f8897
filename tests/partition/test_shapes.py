"""What engines load of a partition: refused shapes come with near ones that all of them load, and with the field."""

import pytest
from transformers import AutoConfig

from tasks import settings
from tasks.engines import limits
from tasks.partition import exporters, shapes

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
FINE = {"experts": 144, "shared_experts": 48, "top_k": 48}
WIDE = {"experts": 16, "shared_experts": 8, "top_k": 4}


def parent(kind="llama", **fields):
    return AutoConfig.for_model(kind, **SMOLLM2 | fields)


def partition(**fields):
    return settings.Partition(**{"method": "activation"} | fields)


def refusal(dense, options):
    with pytest.raises(ValueError, match="engines: ") as raised:
        shapes.require(dense, options)
    return str(raised.value)


def test_too_many_chosen_experts_are_refused_with_near_shapes_at_the_same_active_share():
    said = refusal(parent(), partition(**FINE))
    assert said.startswith(
        "engines: llama.cpp cannot run the granitemoeshared: 48 chosen experts in 30 layers; at most 28"
    )
    assert (
        "nearest shapes that they load, 50% of the FFN active: experts: 18, shared_experts: 6, top_k: 6; experts: 9"
        in said
    )
    assert said.endswith("or set engines: [vllm, transformers]")
    shapes.require(parent(), partition(**FINE, engines=["vllm", "transformers"]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", FINE),
        ("mistral", {"experts": 64, "top_k": 48}),
        ("qwen2", {"experts": 64, "top_k": 48}),
        ("qwen2", WIDE),
        ("qwen3", {"experts": 96, "top_k": 32}),
        ("llama", {"method": "copy", "experts": 64, "top_k": 48, "expert_size": 96}),
        ("llama", {"method": "importance", "sharing": "inner", "experts": 64, "top_k": 48, "expert_size": 40}),
    ],
)
def test_every_shape_that_is_proposed_is_loaded_fits_and_has_the_active_share(kind, options):
    dense, asked = parent(kind), partition(**options)
    found = shapes.nearest(dense, asked)
    assert found
    active = (asked.top_k + asked.shared_experts) * asked.check_width(1536)
    for each in found:
        again = settings.Partition.model_validate(each.model_dump())
        shapes.require(dense, again)
        assert (each.top_k + each.shared_experts) * each.check_width(1536) == active
    assert all(f"experts: {each.experts}" in refusal(dense, asked) for each in found)


def test_a_slow_shape_is_loaded_and_warned_of_with_shapes_that_are_fast():
    said = shapes.warnings(parent(), partition(experts=36, shared_experts=12, top_k=12))
    assert [line.partition(" will be slow")[0] for line in said[:-1]] == ["llama.cpp", "vllm", "transformers"]
    assert "experts of 32 neurons are narrow" in said[0]
    assert said[-1].startswith("nearest shapes that none of llama.cpp, vllm, transformers runs slowly: experts: 18, ")
    for each in shapes.nearest(parent(), partition(experts=36, shared_experts=12, top_k=12), fast=True):
        assert shapes.warnings(parent(), each) == []
    assert shapes.warnings(parent(), partition(**WIDE)) == []


def test_shared_parts_of_token_clusters_are_cut_anew_and_their_routed_expert_with_them():
    asked = partition(method="token_clusters", experts=8, shared_experts=23, top_k=1, expert_size=32)
    assert "experts of 32 neurons are narrow" in shapes.warnings(parent(), asked)[0]
    found = shapes.nearest(parent(), asked, fast=True)
    assert [(each.shared_experts, each.expert_size) for each in found] == [(11, 64), (5, 128), (3, 192)]
    assert all(shapes.warnings(parent(), each) == [] for each in found)


def test_where_no_shape_helps_the_way_out_is_a_class_or_an_engine():
    qwen2 = refusal(parent("qwen2"), partition(**WIDE))
    assert "vllm cannot run the granitemoeshared: it computes no bias on the attention's q, k, v, o" in qwen2
    assert "shared_experts: 0, top_k: 12" in qwen2
    assert "set engines: [llama.cpp, transformers]; or set engines: [vllm, transformers], target: qwen2_moe" in qwen2
    odd = refusal(parent(head_dim=128), partition(**WIDE, target="granitemoeshared", engines=["vllm"]))
    assert "head_dim = 128; it takes hidden / heads = 64" in odd
    tied = refusal(parent("qwen3"), partition(experts=8, top_k=2, engines=["sglang"]))
    assert tied.endswith("take it out of `engines`")
    other = refusal(parent("qwen2"), partition(experts=8, top_k=2, target="granitemoe"))
    assert other.endswith("or set target: qwen2_moe")


def test_no_engine_asked_is_no_engine_refused():
    shapes.require(parent(), partition(**FINE, engines=[]))
    assert shapes.warnings(parent(), partition(**FINE, engines=[])) == []


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_plain_split_of_every_family_is_run_by_all_of_the_default_engines(kind):
    options = partition(experts=8, top_k=2)
    shapes.require(parent(kind), options)
    config = exporters.choose(parent(kind), options).config(parent(kind), options)
    assert not any(limits.slow(engine, config) for engine in options.engines)

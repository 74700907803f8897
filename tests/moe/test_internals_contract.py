"""What tasks/moe/internals assumes about transformers, one test for each assumption.

Each message says which function relies on it, and what to do when a release of transformers breaks it.
"""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers
from sparse_models import CONFIGS, EXPERTS, HIDDEN, TOP_K, UNNORMALISED, build
from torch import nn

from tasks import architectures
from tasks.moe.internals import layers, rope
from tasks.moe.internals.training_router import extend

X_TD = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
CACHE = ("cache", "past_key_values")  # from transformers 5.23 on; until then
KINDS = [*CONFIGS, *UNNORMALISED]


def needs(condition, relies, remedy):
    assert condition, f"transformers {transformers.__version__}: {relies} relies on this. {remedy}"


@pytest.fixture(scope="module", params=KINDS)
def block(request):
    return layers.decoder_layers(build(request.param))[0]


def only(block, kind):
    return [module for module in block.modules() if kind(module)]


def test_a_sparse_layer_has_one_module_named_as_a_router_and_one_named_as_experts(block):
    names = sorted(type(module).__name__ for module in block.modules())
    needs(
        len(only(block, layers.is_router)) == len(only(block, layers.is_experts)) == 1,
        "layers.is_router and is_experts, which go by the ends of class names,",
        f"The layer's classes are {names}: let the two functions know the new names.",
    )


def test_a_router_gives_logits_weights_and_choice(block):
    (router,) = only(block, layers.is_router)
    logits_TE, weights_TK, chosen_TK = router(X_TD)
    shapes = [tuple(each.shape) for each in (logits_TE, weights_TK, chosen_TK)]
    needs(
        shapes == [(5, EXPERTS), (5, TOP_K), (5, TOP_K)] and chosen_TK.dtype == torch.int64,
        "routing._read, and through it the balance losses, the expert load and the monitor",
        f"It gives {shapes}: read them by their new places in routing._read and TrainingRouter.",
    )
    needs(
        torch.allclose(logits_TE, F.linear(X_TD, router.weight)),
        "routing.Routed.logits_TE, logits before softmax,",
        "Take them from a hook on the router's input and weight.",
    )


def test_a_stock_routers_forward_reads_nothing_but_its_attributes_and_multiplies_by_its_weight(block):
    (stock,) = only(block, layers.is_router)
    made = extend(copy.deepcopy(stock))
    for given, wanted in zip(made(X_TD), stock(X_TD), strict=True):
        needs(
            torch.equal(given, wanted),
            "TrainingRouter._as_stock, which calls the class's forward with logits and the identity as weight,",
            "Write the choice and the weights of this class out in TrainingRouter.",
        )
    needs(
        isinstance(made, type(stock)),
        "TrainingRouter, which turns a router's class into a subclass of the stock one",
        "transformers records router logits by isinstance.",
    )


def test_experts_hold_the_gate_above_the_up_projection(block):
    (experts,) = only(block, layers.is_experts)
    layers.run_experts_by_loop(block)
    chosen_TK, weights_TK = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    gate_FD, up_FD = experts.gate_up_proj[0].chunk(2)
    wanted = (F.silu(X_TD @ gate_FD.T) * (X_TD @ up_FD.T)) @ experts.down_proj[0].T
    needs(
        torch.allclose(experts(X_TD, chosen_TK, weights_TK), wanted, atol=1e-6),
        "identity.ffn, expert_parallel's gathering and moe_kernels.register",
        "Adapt the order or the layout of gate_up_proj and down_proj in all three.",
    )


def test_shared_experts_are_found_by_name_with_the_gate_before_the_up_projection(block):
    parts = layers.sparse_ffn(block)
    shared_TD = (F.silu(X_TD @ parts.shared_gate_MD.T) * (X_TD @ parts.shared_up_MD.T)) @ parts.shared_down_DM.T
    named = dict(block.named_modules())
    shared = named.get("shared_mlp") or named.get("mlp.shared_expert")
    others = [name for name in named if "shared" in name and not name.startswith(("shared_mlp", "mlp.shared_expert"))]
    needs(
        not others and (shared is None or torch.allclose(shared_TD, shared(X_TD), atol=1e-6)),
        "layers.sparse_ffn, which finds shared experts by these names, and Granite's gate above its up projection,",
        f"Let it know the new names, such as {others}, or the new order.",
    )


def test_the_choice_of_the_experts_function_is_a_private_field_of_the_config(block):
    (experts,) = only(block, layers.is_experts)
    double = copy.deepcopy(block).double()
    layers.run_experts_by_loop(double)
    (moved,) = only(double, layers.is_experts)
    needs(
        hasattr(experts.config, "_experts_implementation") and moved.config._experts_implementation == "eager",
        "layers.run_experts_by_loop, by which the identity test computes in float64,",
        "Set the experts' implementation by the model's set_experts_implementation.",
    )


@pytest.mark.parametrize("kind", architectures.ALL)
def test_one_layer_is_loaded_from_weights_in_memory_and_what_does_not_fit_is_told(kind):
    row = architectures.ALL[kind]
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, pad_token_id=None,
    )  # fmt: skip
    if isinstance(row, architectures.Sparse):
        setattr(config, row.experts, 2)
        setattr(config, row.expert_size, 8)
        config.num_experts_per_tok = 1
    model = layers.skeleton(config)
    state = {"model.norm.weight": torch.ones(16), "model.layers.0.input_layernorm.weight": torch.full((3,), 2.0)}
    state |= {"model.layers.0.unknown.weight": torch.ones(1)}
    made, problems = layers.load(type(model), config, state=state)
    remedy = "See what from_pretrained takes and tells now, or load the state dict by hand."
    relies = "layers.load, by which Streamed reads a layer and refuses a wrong one,"
    needs({"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(problems), relies, remedy)
    needs("model.layers.0.unknown.weight" in str(problems["unexpected_keys"]), relies, remedy)
    needs(made.dtype == torch.float32 and isinstance(layers.decoder_layers(made)[0], nn.Module), relies, remedy)


def test_a_decoder_layer_is_called_by_itself_with_positions_and_mask(block):
    model = build("mixtral")
    rotary = layers.rotary(model, model.config)
    cos, sin = rotary(torch.zeros(1), torch.arange(5)[None])
    needs(
        cos.shape == sin.shape == (1, 5, 8),
        "Streamed.rotary, which makes the rotary class by its config and calls it with positions alone,",
        "Adapt layers.rotary to its new arguments.",
    )
    mask = layers.attention_mask(model.config, X_TD[None], sliding=False)
    out = block(X_TD[None], position_embeddings=(cos, sin), attention_mask=mask)
    needs(
        isinstance(out, torch.Tensor) and out.shape == (1, 5, HIDDEN),
        "Streamed.forward and the partition's gradients, which run a decoder layer by itself,",
        "Take the hidden states out of what it gives now.",
    )


def test_masks_are_none_for_causal_attention_and_true_where_a_sliding_one_sees():
    config = transformers.MistralConfig(sliding_window=2, attn_implementation="sdpa", num_attention_heads=2)
    sliding = layers.attention_mask(config, X_TD[None], sliding=True)
    wanted = torch.ones(5, 5).tril().bool() & ~torch.ones(5, 5).tril(-2).bool()
    needs(
        sliding is not None and torch.equal(sliding[0, 0], wanted),
        "Streamed.attention and positions.difference",
        "Adapt layers.attention_mask to the masks' new form.",
    )
    needs(
        layers.attention_mask(config, X_TD[None], sliding=False) is None,
        "Streamed.attention, which lets sdpa's causal path run,",
        "Nothing is wrong if it is a mask now, but attention takes longer.",
    )


def test_activations_are_recomputed_in_every_layer_and_nobody_is_warned(recwarn):
    model = build("mixtral")
    layers.recompute_activations(model)
    needs(
        all(layer.gradient_checkpointing for layer in layers.decoder_layers(model)) and not recwarn,
        "layers.recompute_activations",
        f"Call what takes its place; warned of: {[str(each.message) for each in recwarn]}.",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_fourth_argument_of_every_class_is_the_cache(kind):
    names = list(inspect.signature(type(build(kind).base_model).forward).parameters)
    needs(
        names[:5] in (["self", "input_ids", "attention_mask", "position_ids", cache] for cache in CACHE),
        "generation.greedy, which gives it by position,",
        f"The arguments are {names}.",
    )


def test_frequencies_of_scaled_rotary_embeddings_come_from_the_config_alone():
    scaling = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=2, rope_parameters=scaling)
    given, factor = rope.frequencies(config)
    needs(
        torch.allclose(given, 100.0 ** (-torch.arange(0, 8, 2) / 8) / 2) and factor == 1.0,
        "rope.frequencies, by which longrope's factor is written for transformers 4 and Llama 3's is read from GGUF,",
        "See modeling_rope_utils for what takes the place of ROPE_INIT_FUNCTIONS.",
    )


def test_transformers_reads_gguf_by_the_functions_that_are_used():
    from transformers import modeling_gguf_pytorch_utils as gguf

    arguments = list(inspect.signature(gguf.TensorProcessor.process).parameters)[:3]
    processors = {kind for kind, row in architectures.DENSE.items() if getattr(row, "gguf", False)}
    needs(
        callable(gguf.load_gguf_checkpoint) and arguments == ["self", "weights", "name"],
        "gguf_reader.config_fields and restore",
        "See modeling_gguf_pytorch_utils; tests/moe/test_gguf.py holds the result against transformers' own.",
    )
    needs(
        "llama" in gguf.TENSOR_PROCESSORS and not processors - {"llama"} & gguf.TENSOR_PROCESSORS.keys(),
        "gguf_reader.restore, for which the Llama's rows of q and k alone are stored otherwise,",
        "Hold a GGUF of the other architecture against its safetensors.",
    )

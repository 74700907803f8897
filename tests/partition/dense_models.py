"""Tiny dense models of many kinds, and their splits."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.partition import index, split


def dense_model(*, width=48, heads=4, kv_heads=2, tied=False, rope=None, bias=False, layers=2, head_dim=8, seed=0):
    """A random LLaMA, hidden 32, vocabulary 64, with weights large enough that its FFNs matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        attention_bias=bias,
        max_position_embeddings=128,
        initializer_range=0.2,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=3,
        eos_token_id=5,
    )
    return LlamaForCausalLM(config).eval()


def sample(shape=(6, 40), seed=0):
    return np.random.default_rng(seed).integers(0, 64, shape)


def splitting(dense, partition):
    """The index and routers of a conversion, calibrated on random tokens."""
    if partition.method == "random":
        found = split.at_random(dense, partition)
    else:
        found = split.by_activation(dense, sample(), partition=partition, report=lambda text: None)
    return index.Index(layers=found.layers, shared_experts=partition.shared_experts, meta={}), found

"""Tiny dense models of many kinds, and single FFNs."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.moe.streamed import Streamed
from tasks.partition.layer import Layer


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


def stored(folder, dense):
    """The same as a checkpoint folder, to be read a layer at a time."""
    dense.save_pretrained(folder)
    return Streamed(folder)


def ffn(*, tokens=600, hidden=16, width=48, seed=0):
    """A random FFN and what it reads on some tokens."""
    torch.manual_seed(seed)
    return Layer(
        number=0,
        gate_ND=torch.randn(width, hidden),
        up_ND=torch.randn(width, hidden),
        down_DN=torch.randn(hidden, width),
        x_TD=torch.randn(tokens, hidden),
    )

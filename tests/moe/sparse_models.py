"""A tiny model of every sparse class, and a gate that is far from linear."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tasks.moe import gate

EXPERTS, HIDDEN, TOP_K = 6, 16, 2
SIZES = {
    "vocab_size": 32, "hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": TOP_K, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(num_local_experts=EXPERTS, **SIZES),
    "granitemoe": GraniteMoeConfig(num_local_experts=EXPERTS, **SIZES),
    "granitemoeshared": GraniteMoeSharedConfig(num_local_experts=EXPERTS, shared_intermediate_size=8, **SIZES),
    "qwen2_moe": Qwen2MoeConfig(
        num_experts=EXPERTS, moe_intermediate_size=8, norm_topk_prob=True, shared_expert_intermediate_size=8, **SIZES
    ),
    "qwen3_moe": Qwen3MoeConfig(
        num_experts=EXPERTS, moe_intermediate_size=8, norm_topk_prob=True, head_dim=8, **SIZES
    ),
}
UNNORMALISED = {
    "unnormalised": Qwen2MoeConfig(
        num_experts=EXPERTS, moe_intermediate_size=8, norm_topk_prob=False, shared_expert_intermediate_size=8, **SIZES
    )
}


def build(kind="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config((CONFIGS | UNNORMALISED)[kind]).to(dtype).eval()


def lively(layer=0, *, noise=True):
    """A gate far from linear: its inner logits reach into the flat part of tanh."""
    made = gate.start(EXPERTS, HIDDEN, seed=1, layer=layer)
    return gate.Gate(
        inner_ED=made.inner_ED * 30, outer_EE=made.outer_EE * 60, noise_ED=made.noise_ED if noise else None
    )

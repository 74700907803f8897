"""Tiny random models of every class that is read or written, and the config fields that tell them apart."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import architectures

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 3,
    "eos_token_id": 5,
}  # fmt: skip
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}


def config(kind, **fields):
    """A config of the class that `kind` names up to its first comma, with SIZES where `fields` say nothing."""
    return AutoConfig.for_model(kind.partition(",")[0], **SIZES | fields)


def own_fields(kind, *, experts=8, top_k=2, expert_size=48, shared_size=32, bias=False, places=None):
    """The config fields that the row of a class names; `places` are those of dense layers among sparse ones."""
    row = architectures.ALL[kind]
    fields = {row.bias_field: bias} if row.bias_field else {}
    if isinstance(row, architectures.Sparse):
        fields |= {row.experts: experts, "num_experts_per_tok": top_k}
        fields |= {row.expert_size: expert_size} if row.expert_size != "intermediate_size" else {}
        fields |= {row.shared_size: shared_size} if row.shared_size else {}
        fields |= (places or {}) if row.dense_layers else {}
    return fields


def build(kind, *, dtype=torch.float32, varied=True, **fields):
    """A model of this config; biases and norms, which start as zeros and ones, are varied."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **fields), dtype=dtype).eval()
    for name, weights in model.named_parameters():
        if varied and (name.endswith("bias") or "norm" in name):
            weights.data += 0.3 * torch.randn_like(weights)
    return model

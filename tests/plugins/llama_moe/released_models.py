"""Hand-made checkpoints in LLaMA-MoE's formats, and what their own code computes, written down in plain torch."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, SIZE, LAYERS, VOCAB = 32, 4, 2, 8, 4, 12, 4, 64
BASE = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0, "rope_scaling": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "float32", "transformers_version": "4.36.2", "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
V1 = BASE | {
    "architectures": ["LlamaMoEForCausalLM"], "model_type": "llama_moe", "auto_map": {"AutoConfig": "x.y"},
    "intermediate_size": EXPERTS * SIZE, "num_experts": EXPERTS, "num_selects": 2, "pad_token_id": 0,
    "size_experts": [[SIZE] * EXPERTS] * LAYERS, "gate_type": "TopKBalancedNoisyGate", "gate_network": "mlp",
    "gate_use_softmax": True, "gate_use_balance": True, "gate_add_noise": True, "gate_balance_loss_weight": 0.01,
    "gate_noise_epsilon": 0.01, "calculator_type": "UniversalCalculator", "multiply_gate_scores": True,
    "score_scale_factor": 4.0, "add_weight_norm": False, "drop_tokens": True, "dropped_padding": "zero",
    "capacity_factor": 1.25, "gates": "mlp", "pretraining_tp": 1, "attention_bias": False,
}  # fmt: skip
V2 = BASE | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": SIZE,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "scale_factor": 3.0, "moe_type": "modulelist",
    "num_moe_contract_layers": 0, "intermediate_size_residual": None, "use_attn_moe": False, "top_k_attn": None,
    "attn_experts": None, "scale_factor_attn": None, "use_layer_wise_balance": True, "add_rescale_bias": False,
    "router_aux_loss_coef": 0.01, "output_router_logits": True, "sliding_window": 4096, "attention_dropout": 0.0,
}  # fmt: skip


def _common():
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.norm.weight": torch.rand(HIDDEN) + 0.5,
        "lm_head.weight": torch.randn(VOCAB, HIDDEN) * 0.3,
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items():
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = torch.randn(rows * HEAD, HIDDEN) * 0.2
        tensors[f"{layer}.self_attn.o_proj.weight"] = torch.randn(HIDDEN, HEADS * HEAD) * 0.2
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.rand(HIDDEN) + 0.5
    return tensors


def v1_tensors():
    tensors = _common()
    for i in range(LAYERS):
        mlp = f"model.layers.{i}.mlp"
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.randn(HEAD // 2)  # never read
        tensors[f"{mlp}.gate.gate_network.0.weight"] = torch.randn(EXPERTS, HIDDEN) * 0.2
        tensors[f"{mlp}.gate.gate_network.2.weight"] = torch.randn(EXPERTS, EXPERTS)
        tensors[f"{mlp}.gate.weight_noise.weight"] = torch.randn(EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            tensors[f"{mlp}.calculator.experts.weight_gate.{e}"] = torch.randn(SIZE, HIDDEN) * 0.3
            tensors[f"{mlp}.calculator.experts.weight_up.{e}"] = torch.randn(SIZE, HIDDEN) * 0.3
            tensors[f"{mlp}.calculator.experts.weight_down.{e}"] = torch.randn(HIDDEN, SIZE) * 0.3
    return tensors


def v2_tensors(*, residual=0, contract=0, dense="block_sparse_moe"):
    """`residual` neurons beside the experts; the first and last `contract` layers dense, named as `dense` says."""
    tensors = _common()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        if not contract <= i < LAYERS - contract:
            names = ("gate_proj", "down_proj", "up_proj") if dense == "mlp" else ("w1", "w2", "w3")
            _ffn(tensors, f"{layer}.{dense}", EXPERTS * SIZE, names=names)
            continue
        tensors[f"{layer}.block_sparse_moe.gate.weight"] = torch.randn(EXPERTS, HIDDEN) * 0.3
        for e in range(EXPERTS):
            _ffn(tensors, f"{layer}.block_sparse_moe.experts.{e}", SIZE)
        if residual:
            _ffn(tensors, f"{layer}.mlp_residual", residual)
    return tensors


def _ffn(tensors, prefix, width, *, names=("w1", "w2", "w3")):
    for name, shape in zip(names, ((width, HIDDEN), (HIDDEN, width), (width, HIDDEN)), strict=True):
        tensors[f"{prefix}.{name}.weight"] = torch.randn(shape) * 0.3


def save(folder, config, tensors, *, shards=2):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    for n, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[n::shards]}, folder / file)
    where = {name: files[n % shards] for n, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return folder


def logits(config, tensors, ids_BL):
    """LLaMA with the FFNs of LLaMA-MoE v1 or v2, float64 [B, L, V]."""
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[name]

    def ffn(x, gate, up, down):
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def swiglu(x, prefix):
        return ffn(x, w[f"{prefix}.w1.weight"], w[f"{prefix}.w3.weight"], w[f"{prefix}.w2.weight"])

    def routed(x, scores, top_k, *, scale, expert):
        out = torch.zeros_like(x)
        for t, logits_E in enumerate(scores):
            values, index = logits_E.topk(top_k)
            for p, e in zip(values.softmax(0), index.tolist(), strict=True):
                out[t] += scale * p * expert(x[t : t + 1], e)[0]
        return out

    def feed_forward(x, i):
        if config["model_type"] == "llama_moe":
            mlp = f"model.layers.{i}.mlp"
            gate = f"{mlp}.gate.gate_network"
            scores = torch.tanh(x @ w[f"{gate}.0.weight"].T) @ w[f"{gate}.2.weight"].T
            scale = config["score_scale_factor"]
            experts = f"{mlp}.calculator.experts.weight"
            return routed(
                x, scores, config["num_selects"], scale=scale[i] if isinstance(scale, list) else scale,
                expert=lambda x, e: ffn(x, *(w[f"{experts}_{part}.{e}"] for part in ("gate", "up", "down"))),
            )  # fmt: skip
        moe, contract = f"model.layers.{i}.block_sparse_moe", config["num_moe_contract_layers"]
        if not contract <= i < LAYERS - contract:
            mlp = f"model.layers.{i}.mlp"
            if f"{moe}.w1.weight" in w:
                return swiglu(x, moe)
            return ffn(x, *(w[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down")))
        out = routed(
            x, x @ w[f"{moe}.gate.weight"].T, config["num_experts_per_tok"], scale=config["scale_factor"],
            expert=lambda x, e: swiglu(x, f"{moe}.experts.{e}"),
        )  # fmt: skip
        return out + swiglu(x, f"model.layers.{i}.mlp_residual") if config["intermediate_size_residual"] else out

    length = ids_BL.shape[1]
    angle = torch.outer(torch.arange(length).double(), config["rope_theta"] ** (-torch.arange(0, HEAD, 2) / HEAD))
    cos, sin = (torch.cat([f(angle)] * 2, dim=1) for f in (torch.cos, torch.sin))

    def rotate(x):
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    hidden = F.embedding(ids_BL, w["model.embed_tokens.weight"])
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        x = norm(hidden, f"{layer}.input_layernorm.weight")
        q, k, v = (
            (x @ w[f"{layer}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, HEAD)).transpose(1, 2) for n in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (rotate(k), v))
        seen = torch.ones(length, length).tril().bool()
        window = config.get("sliding_window")
        if window:
            seen &= torch.ones(length, length).triu(1 - window).bool()
        scores = (rotate(q) @ k.transpose(2, 3) / HEAD**0.5).masked_fill(~seen, float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + attended @ w[f"{layer}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{layer}.post_attention_layernorm.weight")
        hidden = hidden + feed_forward(x.flatten(0, 1), i).view_as(hidden)
    return norm(hidden, "model.norm.weight") @ w["lm_head.weight"].T

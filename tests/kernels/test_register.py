from pathlib import Path

import moe_kernels
import pytest
import torch
from children import run_python
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROOT = Path(__file__).resolve().parents[2]
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZE, intermediate_size=24, num_local_experts=6))
    if name == "granitemoeshared":
        return GraniteMoeSharedForCausalLM(
            GraniteMoeSharedConfig(
                **SIZE, intermediate_size=12, num_local_experts=12, num_experts_per_tok=4, shared_intermediate_size=24
            )
        )
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZE,
            intermediate_size=48,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            mlp_only_layers=[0],
        )
    )


def logits_and_gradients(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared", "qwen2_moe"])
def test_a_loaded_model_has_the_logits_and_gradients_of_the_eager_implementation(name: str, tmp_path: Path) -> None:
    moe_kernels.register()
    tiny(name).save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_kernels")
    assert ours.config._experts_implementation == "moe_kernels"
    expected_logits, expected = logits_and_gradients(eager)
    logits, gradients = logits_and_gradients(ours)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_model_can_be_switched_after_loading_and_generates_the_same_tokens() -> None:
    moe_kernels.register()
    model = tiny("granitemoeshared").eval()
    prompt = torch.tensor([[1, 2, 3]])
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.set_experts_implementation("eager")
    expected = model.generate(prompt, **generate)
    model.set_experts_implementation("moe_kernels")
    assert torch.equal(model.generate(prompt, **generate), expected)


def test_registering_twice_is_registering_once() -> None:
    moe_kernels.register()
    known = set(ALL_EXPERTS_FUNCTIONS.keys())
    moe_kernels.register()
    assert set(ALL_EXPERTS_FUNCTIONS.keys()) == known
    assert ALL_EXPERTS_FUNCTIONS["moe_kernels"] is moe_kernels.experts_forward


def test_transformers_imports_from_the_root_of_the_project() -> None:
    code = "import transformers; from transformers.integrations import hub_kernels; transformers.MixtralForCausalLM"
    run_python("-c", code, cwd=ROOT)

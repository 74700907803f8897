"""The hidden states that calibration moves up through a model, against the model's own forward pass."""

import pytest
import torch
from dense_models import sample
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.moe.streamed import Streamed
from tasks.partition import calibration

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "multipliers"),
    [
        ("llama", {}),
        ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2}),
    ],
)
def test_states_are_those_of_the_model_over_its_residual_multiplier(kind, multipliers, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | multipliers)).save_pretrained(tmp_path)
    model = Streamed(tmp_path)
    states = calibration.States(model, sample())
    for i in range(model.layers):
        block = model.block(i)
        with torch.no_grad():
            states.residual_TD.add_(block.mlp(states.attend(block, i)))
    found_BLD = states.hidden_BLD * multipliers.get("residual_multiplier", 1.0)
    torch.testing.assert_close(found_BLD, model.forward(torch.from_numpy(sample())), rtol=1e-5, atol=1e-5)

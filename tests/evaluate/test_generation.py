"""Speeds as a user gets them, of experts that transformers' default cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks.evaluate import generation
from tasks.moe import checkpoint


@pytest.mark.parametrize(("width", "engine"), [(32, "grouped_mm"), (6, "eager")])
def test_the_implementation_that_runs_is_named_and_ours_comes_back(
    tiny_model: Path, tmp_path: Path, width: int, engine: str
) -> None:
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=512, hidden_size=64, intermediate_size=width, sliding_window=None, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path, dtype=torch.float32)
    windows = {"one": np.arange(32, dtype=np.int64).reshape(2, 16)}
    speed = generation.stock_speed(model, AutoTokenizer.from_pretrained(tiny_model), windows, batch=2)
    assert speed["engine"] == engine
    assert speed["forward"] > 0
    assert model.config._experts_implementation == "moe_kernels"

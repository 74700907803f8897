from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tasks.pretrain import engine
from tasks.settings import Pretrain

PARAMS = Pretrain(tokens=4096, seq_len=64, batch=8, micro_batch=2, learning_rate=1e-3)


def test_norms_routers_and_embeddings_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = engine.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    kinds = {names[id(parameter)].removesuffix(".weight").rsplit(".", 1)[-1] for parameter in free["params"]}
    assert kinds == {"embed_tokens", "input_layernorm", "post_attention_layernorm", "gate", "norm"}
    grouped = [id(parameter) for parameter in decayed["params"] + free["params"]]
    assert sorted(grouped) == sorted(names)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(tmp_path: Path, flags: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{flags}\n")
    assert engine.cpu_has_bfloat16(cpuinfo) is expected
    assert not engine.cpu_has_bfloat16(tmp_path / "absent")
    assert engine.precision("float32", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_stays_and_sums_of_micro_batches_are_kept_in_fp32(world_size: int, accumulation: int) -> None:
    config = engine.configuration(PARAMS, world_size=world_size, dtype=torch.bfloat16)
    assert config["train_batch_size"] == 8
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["gradient_clipping"] == PARAMS.clip
    assert ("data_types" in config) == (accumulation > 1)


def test_a_failed_operator_build_names_the_mend_and_other_errors_are_left_alone() -> None:
    message = engine.needs_compiler(RuntimeError("Ninja is required to load C++ extensions"))
    assert message is not None
    assert "apt-get install g++ ninja-build" in message
    assert engine.needs_compiler(RuntimeError("size mismatch for lm_head")) is None

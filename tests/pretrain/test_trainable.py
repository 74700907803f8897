"""What belongs to which part, in every class; and phases, in every ZeRO stage and precision, against plain torch."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.moe import gate
from tasks.pretrain import schedule, trainable
from tasks.pretrain.engine import configuration, interface, optimizer
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain
from tasks.settings.pretrain import What
from tests.pretrain.engines import micro_loss, train_step

COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
CLASSES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 8},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1], "head_dim": 8,
    },
}  # fmt: skip
NAMES = {
    "embeddings": r"embed_tokens|lm_head",
    "norms": r"norm",
    "attention": r"self_attn",
    "shared": r"shared",
    "experts": r"\.experts\.",
    "router": r"mlp\.gate\.|block_sparse_moe\.router\.",
    "ffn": r"\.mlp\.(gate|up|down)_proj",
}
"""In this order; the stock names happen to say it all."""


def tiny(kind: str, dtype: torch.dtype = torch.float32, *, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON | CLASSES[kind] | {"num_hidden_layers": layers})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def settings(**fields: Any) -> Pretrain:
    common = {"tokens": 384, "seq_len": 16, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2}
    return Pretrain.model_validate(common | fields)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_parameter_of_every_class_is_in_the_part_that_its_stock_name_says(kind: str) -> None:
    model = tiny(kind)
    expected = {
        name: next(part for part, pattern in NAMES.items() if re.search(pattern, name))
        for name, _ in model.named_parameters()
    }
    assert trainable.parts(model) == expected
    assert ("experts" in expected.values()) == ("router" in expected.values()) == ("moe" in kind or kind == "mixtral")


def test_gates_noise_and_routers_under_another_name_are_routers() -> None:
    model = tiny("mixtral")
    gate.swap_in(model, {0: gate.start(4, 16, seed=0, layer=0)})
    gate.add_noise(model)
    layers: Any = model.base_model.layers
    block = layers[1].mlp
    block.experts_of_no_norm, block.gate = block.gate, nn.Identity()
    part_of = trainable.parts(model)
    routers = {name for name, part in part_of.items() if part == "router"}
    first, second = "model.layers.0.mlp.gate", "model.layers.1.mlp.experts_of_no_norm"
    assert routers == {
        f"{first}.gate.0.weight", f"{first}.gate.2.weight", f"{first}.noise.weight",
        f"{second}.weight", f"{second}.noise.weight",
    }  # fmt: skip


def test_a_parameter_that_no_rule_takes_is_an_error_by_name() -> None:
    model = tiny("llama")
    layers: Any = model.base_model.layers
    layers[1].adapter = nn.Linear(16, 16)
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.adapter\.weight, a parameter of Linear"):
        trainable.parts(model)


def test_norms_biases_routers_and_the_token_embedding_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    model = tiny("qwen2_moe")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    params = settings(learning_rates={"router": 0.5, "shared": 0.25}, weight_decay=0.1)
    groups = trainable.groups(model, params)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    assert len({group["name"] for group in groups}) == len(groups)
    kept = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert kept == {name for name in names.values() if re.search(r"norm|bias|embed_tokens|mlp\.gate\.", name)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates.pop("router") == 0.5
    assert rates.pop("shared") == 0.25
    assert set(rates.values()) == {1e-2}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"train": "router"}, "pretrain.train: `router` trains nothing, since LlamaForCausalLM"),
        (
            "mixtral",
            {"learning_rates": {"shared": 1.0}},
            r"pretrain.learning_rates.shared: .*\(here: attention, embed",
        ),
        ("mixtral", {"train": "router", "learning_rates": {"attention": 1.0}}, "learning_rates.attention"),
    ],
)
def test_a_phase_or_a_rate_for_what_the_model_lacks_is_refused(
    kind: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainable.groups(tiny(kind), settings(**fields))


PHASES: list[What] = ["router", "router", "experts", "experts", "all", "all"]
PHASED = {
    "train": [{"what": "router", "tokens": 128}, {"what": "experts", "tokens": 128}, {"what": "all"}],
    "learning_rates": {"router": 3e-2},
    "clip": 0.2,
    "warmup_tokens": 64,
}


def moments(built: Engine) -> dict[str, torch.Tensor]:
    """Adam's moments by parameter, zeros where there are none yet."""
    from deepspeed.utils import safe_get_full_optimizer_state

    result = {}
    masters = getattr(built.deepspeed.optimizer, "fp32_groups", None)
    keys = {id(p): p for p in built.module.parameters()}
    if masters:
        for low, high in zip(built.deepspeed.optimizer.fp16_groups, masters, strict=True):
            keys |= {id(p): master for p, master in zip(low, high, strict=True)}
    for name, parameter in built.module.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            if not built.deepspeed.global_steps:
                value = None
            elif built.deepspeed.zero_optimization():
                value = safe_get_full_optimizer_state(parameter, kind)
            else:
                value = built.deepspeed.optimizer.state[keys[id(parameter)]].get(kind)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            result[f"{name} {kind}"] = torch.zeros(shape) if value is None else value.detach().clone()
    return result


def in_torch(params: Pretrain) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and gradient norms of the phased run in plain torch and float32."""
    model = tiny("mixtral", layers=1)
    optimizer = torch.optim.AdamW(trainable.groups(model, params), betas=params.betas)
    norms = []
    for step, what in enumerate(PHASES, start=1):
        rates = schedule.share(step, params)
        part_of = trainable.parts(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of[name] in trainable.TRAINED[what])
        for group in optimizer.param_groups:
            group["lr"] = rates * (3e-2 if group["part"] == "router" else 1e-2)
        for micro in range(2):
            (micro_loss(model, step, micro) / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), params.clip)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


def assert_equal(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor]) -> None:
    assert one is not None
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_a_phase_trains_its_parts_alone_and_the_others_come_in_as_torch_would_take_them(
    stage: int, offload: bool, dtype: torch.dtype
) -> None:
    params = settings(**PHASED, zero_stage=stage, offload=offload)
    built = interface.build(tiny("mixtral", dtype, layers=1), params)
    part_of = trainable.parts(built.module)
    norms, after = [], built.full_weights()
    for step, what in enumerate(PHASES, start=1):
        before, moments_before = after, moments(built)
        rates = built.set_rates(step=step, params=params)
        assert {part for part, rate in rates.items() if rate} == set(trainable.TRAINED[what]) & set(part_of.values())
        assert rates["router"] == pytest.approx(3e-2 * schedule.share(step, params))
        norms.append(train_step(built, step)[1])
        after, moments_after = built.full_weights(), moments(built)
        assert before
        assert after
        for name, part in part_of.items():
            inactive = part not in trainable.TRAINED[what]
            assert torch.equal(before[name], after[name]) == inactive, name
            for kind in ("exp_avg", "exp_avg_sq"):
                key = f"{name} {kind}"
                assert torch.equal(moments_before[key], moments_after[key]) == inactive, key
    assert after is not None
    optimizer.activate(built.deepspeed, "router")
    assert_equal(built.full_weights(), after)  # the masters of what is left out too
    expected, expected_norms = in_torch(params)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert norms == pytest.approx(expected_norms, rel=tolerance)
    if dtype == torch.float32:
        for name, tensor in expected.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_no_phase_trains_is_frozen_and_takes_no_place_in_the_optimizer(stage: int) -> None:
    params = settings(train="experts", zero_stage=stage)
    model = tiny("mixtral")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    built = interface.build(model, params)
    assert {group["part"] for group in built.deepspeed.optimizer.param_groups} == {"router", "experts"}
    built.set_rates(step=1, params=params)
    train_step(built, 1)
    weights = built.full_weights()
    assert weights is not None
    for name, part in trainable.parts(built.module).items():
        assert built.module.get_parameter(name).requires_grad == (part in ("router", "experts"))
        assert torch.equal(weights[name], start[name]) == (part not in ("router", "experts"))


def sizes(model: PreTrainedModel) -> Counter[str]:
    result: Counter[str] = Counter()
    for name, part in trainable.parts(model).items():
        result[part] += model.get_parameter(name).numel()
    return result


@pytest.mark.usefixtures("process_group")
def test_the_modules_that_autoep_puts_in_place_are_in_the_same_parts_and_groups() -> None:
    pytest.importorskip("tasks.plugins.expert_parallel")
    params = settings()
    config = configuration.of(params, dtype=torch.float32)
    config["expert_parallel"] = {"enabled": True, "autoep_size": 1, "preset_model": "mixtral"}
    model = tiny("mixtral")
    expected = sizes(model)
    built = interface.build(model, params, config=config)
    assert sizes(built.module) == expected
    grouped: Counter[str] = Counter()
    for group, flat in zip(
        built.deepspeed.optimizer.param_groups, built.deepspeed.optimizer.bit16_groups, strict=True
    ):
        grouped[group["part"]] += sum(parameter.numel() for parameter in flat)
    assert grouped == expected

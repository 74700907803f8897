"""The engine's configuration and its optimizer step, in every ZeRO stage and precision, against plain torch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension  # here, before any test: setuptools, which it imports, refuses to after distutils
from transformers import MixtralForCausalLM

from tasks.pretrain import trainable
from tasks.pretrain.engine import configuration, interface
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain
from tests.pretrain.engines import micro_loss, mixtral, train_step

PARAMS = Pretrain(tokens=4096, seq_len=64, batch=8, micro_batch=2, learning_rate=1e-3)
KINDS = [
    pytest.param(stage, offload, dtype, id=f"zero{stage}-{'offload-' * offload}{name}")
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if not offload or (stage, name) in {(1, "fp32"), (2, "bf16"), (3, "bf16")}
]


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"DeepSpeed compiles {name}")

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)


def tiny(dtype: torch.dtype) -> MixtralForCausalLM:
    return mixtral(dtype, num_hidden_layers=1, output_router_logits=True)


def settings(stage: int, *, offload: bool = False, **fields: Any) -> Pretrain:
    common = {"tokens": 4096, "seq_len": 16, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "clip": 0.2}
    return Pretrain.model_validate(common | fields | {"zero_stage": stage, "offload": offload})


def build(params: Pretrain, dtype: torch.dtype) -> Engine:
    return interface.build(tiny(dtype), params)


def state(built: Engine) -> dict[str, torch.Tensor]:
    """Weights, masters and everything that AdamW keeps, bit by bit."""
    result = {f"weight {name}": tensor for name, tensor in (built.full_weights() or {}).items()}
    for i, each in enumerate(built.deepspeed.basic_optimizer.state.values()):
        result |= {f"{name} {i}": value.clone() for name, value in each.items() if torch.is_tensor(value)}
    return result


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "offload", "dtype"), KINDS)
def test_a_gradient_that_is_not_finite_is_told_and_changes_nothing(
    stage: int, offload: bool, dtype: torch.dtype
) -> None:
    params = settings(stage, offload=offload)
    plain, disturbed = build(params, dtype), build(params, dtype)
    assert train_step(plain, 0) == train_step(disturbed, 0)
    before = state(disturbed)
    assert not torch.tensor(train_step(disturbed, 50, factor=float("nan"))[1]).isfinite()
    assert not torch.tensor(train_step(disturbed, 51, factor=float("inf"))[1]).isfinite()
    assert same(before, state(disturbed))
    for step in (1, 2):
        assert train_step(plain, step) == train_step(disturbed, step)
    assert same(state(plain), state(disturbed))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "offload", "dtype"), KINDS)
def test_a_discarded_step_leaves_no_trace(stage: int, offload: bool, dtype: torch.dtype) -> None:
    params = settings(stage, offload=offload)
    plain, disturbed = build(params, dtype), build(params, dtype)
    nan = float("nan")
    for step, discarded in enumerate(([[1.0]], [[1.0, 1.0]], [[1.0, 1.0], [nan], [1.0, nan]])):
        for factors in discarded:  # of a loss, for each micro-batch of a step that is given up
            for micro, factor in enumerate(factors):
                if micro:
                    disturbed.next_micro_batch()
                disturbed.backward(micro_loss(disturbed, 50, micro) * factor)
            disturbed.discard_step()
        assert train_step(plain, step) == train_step(disturbed, step)
    assert same(state(plain), state(disturbed))


def in_torch(params: Pretrain, dtype: torch.dtype, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Masters and gradient norms of plain torch: sums of gradients, AdamW and masters in float32."""
    model = tiny(dtype)
    masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    of = {id(parameter): masters[name] for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = trainable.groups(model, params)
    for group in groups:
        group["params"] = [of[id(parameter)] for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=params.betas)
    norms = []
    for step in range(steps):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in range(2):
            (micro_loss(model, step, micro) / 2).backward()
            for name, parameter in model.named_parameters():
                masters[name].grad += parameter.grad  # type: ignore[operator]
            model.zero_grad()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), params.clip)))
        optimizer.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name])
    return masters, norms


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "offload", "dtype"), KINDS)
def test_steps_and_gradient_norms_are_those_of_plain_torch(stage: int, offload: bool, dtype: torch.dtype) -> None:
    params = settings(stage, offload=offload, weight_decay=0.5)
    built = build(params, dtype)
    weights = built.full_weights()
    assert weights is not None
    for name, parameter in tiny(dtype).named_parameters():
        assert torch.equal(weights[name], parameter.detach().float()), f"{name} has moved before the first step"
    norms = [train_step(built, step)[1] for step in range(3)]
    expected, expected_norms = in_torch(params, dtype, 3)
    fp32 = dtype == torch.float32
    assert norms == pytest.approx(expected_norms, rel=1e-5 if fp32 else 2e-3)
    weights = built.full_weights()
    assert weights is not None
    for name, master in expected.items():
        off = (weights[name] - master).abs().mean()  # of up to 0.03 by which a weight moves
        assert off < (1e-6 if fp32 else 1e-3), name


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_stays_and_sums_of_micro_batches_are_kept_in_fp32(world_size: int, accumulation: int) -> None:
    config = configuration.of(PARAMS.model_copy(update={"processes": world_size}), dtype=torch.bfloat16)
    assert config["train_batch_size"] == 8
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["gradient_clipping"] == PARAMS.clip
    assert ("data_types" in config) == (accumulation > 1)


def test_the_configuration_is_json_and_names_the_optimizer_that_trains() -> None:
    params = settings(3, offload=True, betas=(0.8, 0.99), weight_decay=0.05)
    config = configuration.of(params, dtype=torch.float32)
    assert json.loads(json.dumps(config)) == config
    assert config["optimizer"]["params"].items() >= {"lr": 1e-2, "betas": [0.8, 0.99], "weight_decay": 0.05}.items()
    assert {name for name in config["zero_optimization"] if "offload" in name} == {
        "offload_optimizer",
        "offload_param",
    }
    assert "expert_parallel" not in config


def test_offload_without_zero_is_refused_with_the_fix() -> None:
    with pytest.raises(TrainingError, match=r"pretrain\.offload: true needs zero_stage 1, 2 or 3"):
        configuration.of(settings(0, offload=True), dtype=torch.float32)


def test_a_failed_operator_build_names_the_fix_and_other_errors_are_left_alone() -> None:
    message = interface.needs_compiler(RuntimeError("Ninja is required to load C++ extensions"))
    assert message is not None
    assert "apt-get install g++ ninja-build" in message
    assert interface.needs_compiler(RuntimeError("size mismatch for lm_head")) is None

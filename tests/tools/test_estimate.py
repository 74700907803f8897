"""Memory, disk and time of a run, against what autograd keeps, what the ZeRO paper printed, and counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_kernels import sorted_rows

from tasks.moe import counts
from tasks.moe.internals import layers
from tasks.settings import Pretrain
from tasks.tools import calibrate, estimate

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 128, "head_dim": 16}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "granite": {"model_type": "granitemoeshared", "intermediate_size": 96, "num_local_experts": 8,
                "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    "granite, narrow": {"model_type": "granitemoeshared", "intermediate_size": 8, "num_local_experts": 16,
                        "num_experts_per_tok": 6, "shared_intermediate_size": 64},
    "qwen2": {"model_type": "qwen2_moe", "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
              "shared_expert_intermediate_size": 64, "intermediate_size": 160, "mlp_only_layers": [1]},
    "qwen3": {"model_type": "qwen3_moe", "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
              "intermediate_size": 160, "mlp_only_layers": []},
}  # fmt: skip


def config(name: str, **fields: Any) -> dict[str, Any]:
    return SIZES | MODELS[name] | fields


def params(**fields: Any) -> Pretrain:
    return Pretrain(**{"tokens": 1 << 14, "seq_len": 64, "batch": 4, "micro_batch": 2, "learning_rate": 1e-3} | fields)


def kept_by_autograd(model: Any, ids: torch.Tensor) -> int:
    """Bytes of all storages that a forward pass saves for backward, weights and the logits left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (where := tensor.untyped_storage().data_ptr()) not in weights:
            kept[where] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name: str, dtype: torch.dtype) -> None:
    model = calibrate.random_model(config(name), dtype=dtype, device=torch.device("cpu")).train()
    run = params()
    kept = kept_by_autograd(model, torch.randint(0, 128, (run.micro_batch, run.seq_len)))
    parts = estimate.activations(config(name), run, bfloat16=dtype == torch.bfloat16, cuda=False)
    assert parts["activations"] == pytest.approx(kept, rel=0.04)


def test_gradient_checkpointing_keeps_a_state_for_each_layer_and_one_layer_whole() -> None:
    run = params(gradient_checkpointing=True)
    model = calibrate.random_model(config("mixtral"), dtype=torch.float32, device=torch.device("cpu")).train()
    layers.recompute_activations(model)
    between = kept_by_autograd(model, torch.randint(0, 128, (run.micro_batch, run.seq_len)))
    one, four, eight = (
        estimate.activations(
            config("mixtral", num_hidden_layers=layers), run, bfloat16=False, cuda=False
        )["activations"]
        for layers in (1, 4, 8)
    )  # fmt: skip
    states = run.micro_batch * run.seq_len * 64 * 4
    assert (eight - four) / 4 == (four - one) / 3 == states
    whole = estimate.activations(config("mixtral", num_hidden_layers=1), params(), bfloat16=False, cuda=False)
    assert one == whole["activations"] + states
    assert between == pytest.approx(3 * states + (one - whole["activations"]) * 3, rel=0.3)


def bytes_per_parameter(stage: int, processes: int, **fields: Any) -> float:
    fields = {"precision": "bfloat16", "batch": 64, "micro_batch": 1} | fields
    run = params(zero_stage=stage, processes=processes, **fields)
    taken = estimate.memory(config("mixtral"), run, bfloat16=True).host
    states = sum(taken[part] for part in ("weights", "gradients", "optimizer"))
    return states / counts.parameters(config("mixtral"))["total"]


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_divides_the_states_as_its_paper_says(stage: int, gigabytes: float) -> None:
    """arXiv 1910.02054, figure 1: 7.5 billion parameters, 64 devices, mixed precision with Adam."""
    assert bytes_per_parameter(stage, 64) * 7.5 == pytest.approx(gigabytes, abs=0.06)


def test_sums_of_micro_batches_are_float32_and_divided_from_stage_2_on() -> None:
    for stage, sums in ((0, 0), (1, 4), (2, 1), (3, 1)):
        more = bytes_per_parameter(stage, 4, batch=8) - bytes_per_parameter(stage, 4, batch=4)
        assert more == sums


@pytest.mark.parametrize("stage", [1, 2])
def test_experts_that_are_spread_are_held_once_by_those_who_share_them(stage: int) -> None:
    sizes = counts.parameters(config("mixtral"))
    run = params(zero_stage=stage, processes=4, batch=4, micro_batch=1, expert_parallel=2)
    taken = estimate.memory(config("mixtral"), run, bfloat16=False).host
    assert taken["weights"] == 4 * (sizes["total"] - sizes["experts"] / 2)
    assert taken["optimizer"] == 12 * sizes["total"] / 4  # every copy of a half of the experts is on two processes


def test_what_is_never_trained_has_no_gradients_and_no_moments() -> None:
    sizes = counts.parameters(config("granite"))
    only = {
        "router": sizes["router"],
        "experts": sizes["router"] + sizes["experts"] + sizes["shared"],
        "all": sizes["total"],
    }
    for what, moved in only.items():
        taken = estimate.memory(config("granite"), params(train=what), bfloat16=False).host
        assert (taken["weights"], taken["gradients"]) == (4 * sizes["total"], 4 * moved)
        assert taken["optimizer"] == 12 * moved
    phases = [{"what": "router", "tokens": 1024}, {"what": "experts"}]
    assert estimate.trained(config("granite"), params(train=phases)) == only["experts"]


def test_float32_without_zero_has_no_second_copy_of_the_weights() -> None:
    total = counts.parameters(config("mixtral"))["total"]
    optimizer = [
        estimate.memory(config("mixtral"), params(zero_stage=stage), bfloat16=bfloat16).host["optimizer"] / total
        for stage, bfloat16 in ((0, False), (1, False), (0, True), (1, True))
    ]
    assert optimizer == [8, 12, 12, 12]


def test_offload_moves_the_optimizer_and_in_stage_3_the_weights_to_the_host() -> None:
    for stage in (2, 3):
        run = params(zero_stage=stage)
        there, here = (
            estimate.memory(config("mixtral"), run.model_copy(update={"offload": offload}), bfloat16=True, cuda=True)
            for offload in (False, True)
        )
        moved = there.device["optimizer"] + (there.device["weights"] if stage == 3 else 0)
        assert there.device_total - here.device_total == moved
        assert here.host_total - there.host_total == moved


def test_compiled_products_grow_with_the_passes_up_to_one_for_each_number_of_rows() -> None:
    def compiled(steps: int, *, bfloat16: bool = True) -> float:
        run = params(tokens=steps * 4 * 64, micro_batch=4)
        return estimate.memory(config("mixtral"), run, bfloat16=bfloat16).host["buffers"]

    numbers = len({sorted_rows.rounded(rows) for rows in range(1, 4 * 64 + 1)})
    assert numbers > 3 * 8  # layers, experts
    assert compiled(2) - compiled(1) == pytest.approx(6 * (numbers - 3 * 8) * 0.66e6)  # 6 products
    assert compiled(2) == compiled(1 << 13)
    assert compiled(3, bfloat16=False) == compiled(2, bfloat16=False)


def test_the_parent_is_in_memory_unless_its_logits_are_kept() -> None:
    dense = SIZES | {"model_type": "llama", "intermediate_size": 192}
    size = 2 * counts.parameters(dense)["total"]
    for distill, held in (({"logits": 1.0}, size), ({"top_n": 8}, 0), (None, 0)):
        taken = estimate.memory(config("mixtral"), params(distill=distill), bfloat16=True, parent=dense).host
        assert taken.get("parent", 0) == held


def test_the_checkpoints_copy_and_the_gathered_weights_are_the_first_ranks() -> None:
    run = params(zero_stage=1, processes=2, batch=4, micro_batch=1)
    total = counts.parameters(config("mixtral"))["total"]
    first, other = (
        estimate.memory(config("mixtral"), run, bfloat16=True, cuda=True, first=first).host for first in (True, False)
    )
    assert first["checkpoint"] - other["checkpoint"] == 2 * total
    assert other["checkpoint"] == 12 * total / 2


def test_disk_has_the_checkpoints_kept_and_the_one_being_written() -> None:
    total = counts.parameters(config("mixtral"))["total"]
    run = params(save_every=8, keep=3, keep_every=32)  # 64 steps
    (size,) = estimate.disk(config("mixtral"), run, bfloat16=True).values()
    assert size == (3 + 2 + 1) * 14 * total
    (size,) = estimate.disk(config("mixtral"), params(save_every=64, zero_stage=0), bfloat16=False).values()
    assert size == 2 * 12 * total
    (name,) = wsd = estimate.disk(
        config("mixtral"), params(save_every=8, schedule="wsd", keep_finished=True), bfloat16=True
    )
    assert "2 stay, to run longer" in name
    assert wsd[name] == (2 + 1 + 1) * 14 * total
    cached = estimate.disk(config("mixtral"), params(distill={"top_n": 64}), bfloat16=True)
    assert cached["the parent's logits in .scratch"] == (1 << 14) * (64 * 4 + 4)


@pytest.mark.parametrize(("tokens", "eval_tokens"), [(1 << 14, 1024), (1 << 14, 1 << 20), (1 << 14, 5000)])
def test_held_out_windows_are_those_before_between_and_after_the_steps(tokens: int, eval_tokens: int) -> None:
    run = params(tokens=tokens, eval_tokens=eval_tokens, eval_windows=3)
    times = 1 + sum(step == run.steps or step % run.eval_every == 0 for step in range(1, run.steps + 1))
    assert estimate.evaluated_windows(run, domains=5) == times * 3 * 5


def test_time_is_the_sum_of_its_parts() -> None:
    speed = estimate.Speed(
        start=10, micro_batch=2, optimizer=1, evaluation=0.5, copy=1e-9, processes=1, peak=0
    )  # fmt: skip
    run = params(batch=8, micro_batch=2, tokens=10 * 8 * 64, save_every=4, eval_windows=1)
    assert speed.step(run) == 4 * 2 + 1
    assert speed.run(run, domains=2, checkpoint=1e9) == {
        "start": 10, "steps": 90, "evaluation": 2 * 2 * 0.5, "checkpoints": pytest.approx(3)
    }  # fmt: skip


def test_a_calibration_runs_the_real_step_and_its_memory_is_near_the_estimate() -> None:
    run = params(precision="float32", warmup_tokens=1024, train=[{"what": "router", "tokens": 1024}, {"what": "all"}])
    speed = calibrate.measure(config("granite"), run)
    assert speed.processes == 1
    assert min(speed.start, speed.micro_batch, speed.optimizer, speed.evaluation, speed.copy) > 0
    expected = estimate.memory(config("granite"), run, bfloat16=False)
    assert speed.peak == pytest.approx(expected.host_total - expected.host["checkpoint"], rel=0.15)

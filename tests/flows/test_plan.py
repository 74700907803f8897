"""What a pipeline costs, from its settings alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flows import plan, plan_view
from tasks import settings
from tests.flows.conftest import ROOT


@pytest.fixture(scope="module")
def config() -> settings.Settings:
    return settings.load(ROOT / "pipelines.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded here, so the plan has the settings alone."""
    monkeypatch.chdir(tmp_path)


SIZES = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "target"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"shared_experts": 2}, "granitemoeshared"),
        ("llama", {"layers": "alternate"}, "qwen2_moe"),
        ("mistral", {}, "mixtral"),
        ("qwen2", {"shared_experts": 2, "target": "qwen2_moe", "layers": [1, 2]}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
    ],
)
def test_counts_are_those_of_the_model_that_the_partition_stage_builds(
    family: str, fields: dict[str, Any], target: str
) -> None:
    """Oracle: numel() of the stock class built from the exporter's own config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.moe import counts
    from tasks.partition import exporters

    dense = {"model_type": family, **SIZES} | ({"sliding_window": None} if family == "mistral" else {})
    partition = settings.Partition(**{"method": "activation", "experts": 8, "top_k": 3} | fields)
    parent = AutoConfig.for_model(**dense)
    config = exporters.choose(parent, partition).config(parent, partition)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    planned = plan.sparse_config(dense, partition)
    assert planned["model_type"] == target
    assert counts.experts(planned)["layers"] == partition.sparse_layers(4)
    assert counts.parameters(planned)["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_family_that_no_class_can_express_is_refused_before_anything_runs() -> None:
    partition = settings.Partition(method="random", experts=8, top_k=3)
    with pytest.raises(settings.SettingsError, match="GeGLU"):
        plan.sparse_config({"model_type": "gemma2", **SIZES}, partition)
    with pytest.raises(settings.SettingsError, match="mixtral"):
        plan.sparse_config({"model_type": "llama", "mlp_bias": True, **SIZES}, partition)
    with pytest.raises(settings.SettingsError, match="does not divide"):
        plan.sparse_config({"model_type": "llama", **SIZES | {"intermediate_size": 81}}, partition)


def test_a_plan_of_a_fetched_model_reads_its_config_and_no_weights(config: settings.Settings) -> None:
    """A Qwen2 under data/models, with its config.json alone."""
    folder = Path("data/models/smollm2-135m-q4")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **SIZES | {"intermediate_size": 1536}}))
    cost = plan.plan(config, "demo", bfloat16=True)
    assert cost.dense["total"] == 4 * (3 * 32 * 1536 + 32 * 96 + 64 + 2 * 32) + 32 + 2 * 100 * 32


def test_dense_layers_among_sparse_ones_keep_the_activations_of_their_whole_ffn(config: settings.Settings) -> None:
    sizes = {"model_type": "qwen3_moe", **SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 1,
             "moe_intermediate_size": 8}  # fmt: skip
    train = config.pipeline("demo").pretrain

    def kept(**fields: Any) -> float:
        return plan.memory(sizes | fields, train, bfloat16=False)["activations"]

    tokens = train.micro_batch * train.seq_len
    assert kept(mlp_only_layers=[0, 2]) - kept() == 2 * tokens * 3 * (80 - 8) * 4


def test_the_demo_needs_what_its_numbers_say(config: settings.Settings) -> None:
    cost = plan.plan(config, "demo", bfloat16=True)
    assert cost.dense["total"] == 134_515_008
    assert (cost.steps, cost.tokens, cost.expert_width) == (48, 49152, 8)
    assert (cost.model_type, cost.sparse_layers, cost.layers) == ("granitemoeshared", 30, 30)
    # 6 FLOPs per active parameter and token, more for attention scores: the rule of thumb must be near.
    assert cost.train_flops == pytest.approx(6 * cost.sparse["active"] * cost.tokens, rel=0.25)
    total = cost.sparse["total"]
    assert cost.memory["weights"] == 2 * total
    assert cost.memory["optimizer"] == 12 * total
    assert cost.memory["total"] == sum(size for part, size in cost.memory.items() if part != "total")
    assert cost.disk["dense checkpoint"] == 4 * 134_515_008


def test_float32_needs_more_weights_and_less_optimizer(config: settings.Settings) -> None:
    total = plan.plan(config, "demo", bfloat16=False).sparse["total"]
    memory = plan.plan(config, "demo", bfloat16=False).memory
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * total, 4 * total, 8 * total)


@pytest.mark.parametrize(
    ("stage", "divided"), [(0, set()), (1, {"optimizer"}), (2, {"optimizer", "gradients"}),
                           (3, {"optimizer", "gradients", "weights"})]
)  # fmt: skip
def test_zero_divides_more_with_every_stage(stage: int, divided: set[str]) -> None:
    config = {"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
              "num_attention_heads": 2, "vocab_size": 16, "num_local_experts": 2,
              "num_experts_per_tok": 1}  # fmt: skip

    def memory(processes: int) -> dict[str, float]:
        train = settings.Pretrain(
            tokens=8 * 64, seq_len=8, batch=8, processes=processes, zero_stage=stage, learning_rate=1e-3
        )
        return plan.memory(config, train, bfloat16=False)

    one, four = memory(1), memory(4)
    shares = {part: one[part] / four[part] for part in ("weights", "gradients", "optimizer")}
    assert {part for part, share in shares.items() if share == 4} == divided
    assert all(share in (1, 4) for share in shares.values())


def test_gradient_checkpointing_keeps_fewer_activations(config: settings.Settings) -> None:
    pipeline = config.pipeline("demo")
    sparse = plan.sparse_config(plan.dense_config(config, pipeline.model), pipeline.partition)
    often = pipeline.pretrain.model_copy(update={"gradient_checkpointing": True})
    kept = plan.memory(sparse, pipeline.pretrain, bfloat16=True)["activations"]
    assert plan.memory(sparse, often, bfloat16=True)["activations"] < 0.8 * kept


def test_a_model_without_shape_says_what_to_do(config: settings.Settings) -> None:
    model = config.models["smollm2-135m-q4"].model_copy(update={"shape": None})
    bare = config.model_copy(update={"models": {"smollm2-135m-q4": model}})
    with pytest.raises(
        settings.SettingsError, match=r"models\.smollm2-135m-q4\.shape is missing .* or run `dvc repro"
    ):
        plan.plan(bare, "demo", bfloat16=True)


def test_time_follows_from_flops_and_speed(config: settings.Settings) -> None:
    cost = plan.plan(config, "demo", bfloat16=True)
    assert cost.seconds(1e12) == pytest.approx((cost.train_flops + cost.other_flops) / 0.4e12)
    assert cost.seconds(2e12) == pytest.approx(cost.seconds(1e12) / 2)


def test_calibration_measures_a_plausible_speed() -> None:
    speed, where = plan.calibrate(bfloat16=False, seconds=0.1)
    assert 1e9 < speed < 1e16
    assert where


@pytest.mark.parametrize(("seconds", "shown"), [(40, "40 s"), (600, "10.0 min"), (4e4, "11.1 h"), (3e5, "3.5 days")])
def test_times_are_shown_in_a_unit_that_fits(seconds: float, shown: str) -> None:
    assert plan_view.clock(seconds) == shown


def test_reasons_are_shortened_with_their_number() -> None:
    assert plan_view.shorten(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"
    assert plan_view.shorten(["a"]) == "a"

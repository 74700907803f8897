"""What a pipeline costs, from its settings alone."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from flows import plan, plan_view
from tasks import settings
from tasks.tools.estimate import Memory, Speed
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
    cost = plan.plan(config, "fine", bfloat16=True)
    assert cost.dense["total"] == 4 * (3 * 32 * 1536 + 32 * 96 + 64 + 2 * 32) + 32 + 2 * 100 * 32


def test_a_pipeline_needs_what_its_numbers_say(config: settings.Settings) -> None:
    cost = plan.plan(config, "fine", bfloat16=True)
    assert cost.dense["total"] == 134_515_008
    assert (cost.steps, cost.tokens, cost.expert_width) == (48, 49152, 8)
    assert (cost.model_type, cost.sparse_layers, cost.layers) == ("granitemoeshared", 30, 30)
    # 6 FLOPs per active parameter and token, more for attention scores: the rule of thumb must be near.
    assert cost.train_flops == pytest.approx(6 * cost.sparse["active"] * cost.tokens, rel=0.25)
    total = cost.sparse["total"]
    assert list(cost.memory) == [0, 1, 2, 3]
    assert cost.memory[1][0].host["weights"] == 2 * total
    assert cost.memory[1][0].host["optimizer"] == 12 * total
    assert cost.disk["dense checkpoint"] == 4 * 134_515_008
    name = "training checkpoints in .scratch, 2 and one being written"
    assert cost.disk[name] == 3 * 14 * total


def changed(config: settings.Settings, section: str, **fields: Any) -> plan.Plan:
    """The plan of `fine` with other settings in one section."""
    fine = config.pipelines["fine"]
    known = getattr(fine, section)
    pipeline = fine.model_copy(update={section: type(known)(**known.model_dump() | fields)})
    return plan.plan(config.model_copy(update={"pipelines": {"fine": pipeline}}), "fine", bfloat16=True)


def test_phases_that_train_less_cost_less(config: settings.Settings) -> None:
    """Half of the tokens train the router alone, whose backward pass stops short of the weights' gradients."""
    whole = changed(config, "pretrain").train_flops
    phases = changed(config, "pretrain", train=[{"what": "router", "tokens": 24576}, {"what": "all"}]).train_flops
    assert whole / 2 < phases < whole


def test_a_distilling_parent_reads_every_token_once(config: settings.Settings) -> None:
    from tasks.moe import counts

    more = changed(config, "pretrain", distill={"logits": 1.0})
    dense = plan.dense_config(config, config.pipelines["fine"].model)
    extra = more.other_flops - changed(config, "pretrain").other_flops
    assert extra == 49152 * counts.flops_per_token(dense, seq_len=512)["forward"]


def test_a_fit_costs_seven_products_of_each_token_with_an_ffn_matrix_in_every_layer(config: settings.Settings) -> None:
    partition = config.pipelines["fine"].partition
    less = changed(config, "partition", fit_passes=partition.fit_passes - 1)
    extra = changed(config, "partition").other_flops - less.other_flops
    assert extra == 7 * (2 * 576 * 1536) * 30 * partition.calibration_windows * 512


def test_processes_that_do_not_fit_into_this_machine_are_told_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first, other = Memory(host={"weights": 4e9, "process": 1e9}, device={}), Memory(host={"weights": 3e9}, device={})
    assert plan_view.lacks(first, [other]) == ""
    assert plan_view.lacks(first, [other, other]) == "does not fit here (RAM: 11.0 of 10.0 GB)"


def printed(tables: list[Table]) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(*tables)
    return console.export_text()


def test_the_plan_shows_every_zero_stage_and_marks_the_one_that_is_set(config: settings.Settings) -> None:
    text = printed(plan_view.figures(config, "fine", tflops=100.0))
    assert [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│ ")][-4:] == list("0123")
    assert next(line for line in text.splitlines() if line.startswith("│ 1 ")).rstrip("│ ").endswith("set")


def test_the_plan_has_a_line_for_every_engine_and_shapes_that_are_not_slow(config: settings.Settings) -> None:
    text = " ".join(printed(plan_view.figures(config, "fine", tflops=100.0)).split())
    assert "llama.cpp, Ollama │ no │ 48 chosen experts in 30 layers; at most 28: take fewer and wider ones" in text
    assert "vLLM │ slowly │ 8 neurons are no multiple of 64" in text
    assert "SGLang │ slowly │" in text
    assert "transformers 4 │ yes │ not in `engines`" in text
    assert "better │ │ nearest shapes that none of vllm, transformers runs slowly: experts: 18, " in text
    good = changed(config, "partition", experts=16, top_k=4, shared_experts=8, engines=["llama.cpp"])
    assert [each.engine for each in good.engines if each.refused or each.slow] == []


def test_a_calibrated_plan_takes_time_and_peak_from_the_measured_steps(
    config: settings.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.tools import calibrate

    asked = []

    def measure(sparse: dict[str, Any], train: settings.Pretrain, *, parent: dict[str, Any] | None) -> Speed:
        asked.append((sparse["model_type"], train.batch, parent))
        return Speed(start=20, micro_batch=4, optimizer=1, evaluation=2, copy=0, processes=1, peak=3_210_000_000)

    monkeypatch.setattr(calibrate, "measure", measure)
    text = printed(plan_view.figures(config, "fine", tflops=None, calibrated=True))
    assert asked == [("granitemoeshared", 2, None)]
    assert "205 tokens/s" in text  # 1024 tokens in 5 s
    assert "4.0 min" in text  # 48 steps
    assert "2.4 min" in text  # validation windows: 9 times, 2 of 4 domains
    assert "3.21" in text


def test_a_model_without_shape_says_what_to_do(config: settings.Settings) -> None:
    model = config.models["smollm2-135m-q4"].model_copy(update={"shape": None})
    bare = config.model_copy(update={"models": {"smollm2-135m-q4": model}})
    with pytest.raises(
        settings.SettingsError, match=r"models\.smollm2-135m-q4\.shape is missing .* or run `dvc repro"
    ):
        plan.plan(bare, "fine", bfloat16=True)


def test_time_follows_from_flops_and_speed(config: settings.Settings) -> None:
    cost = plan.plan(config, "fine", bfloat16=True)
    assert cost.seconds(1e12) == pytest.approx((cost.train_flops + cost.other_flops) / 0.4e12)
    assert cost.seconds(2e12) == pytest.approx(cost.seconds(1e12) / 2)


def test_the_speed_of_matrix_products_is_plausible() -> None:
    speed, where = plan_view.matrix_speed(bfloat16=False)
    assert 1e9 < speed < 1e16
    assert where


def test_times_have_a_unit_that_fits_and_reasons_are_shortened_with_their_number() -> None:
    for seconds, shown in ((40, "40 s"), (600, "10.0 min"), (4e4, "11.1 h"), (3e5, "3.5 days")):
        assert plan_view.clock(seconds) == shown
    assert plan_view.shorten(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"
    assert plan_view.shorten(["a"]) == "a"


def test_a_disk_that_is_too_small_is_told_with_what_lies_on_it(
    config: settings.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = plan.plan(config, "fine", bfloat16=True)
    needed = sum(cost.disk.values())
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1e6))
    (lack,) = plan.disk_lacks(cost, "smollm2-135m-q4")
    assert lack.startswith("does not fit here: .scratch, data, runs needs")
    Path("runs/fine/moe").mkdir(parents=True)  # what is there needs no more place
    assert plan.disk_lacks(cost, "smollm2-135m-q4") == []


def test_windows_that_the_corpus_does_not_have_are_told(config: settings.Settings) -> None:
    assert plan.short_windows(config, "fine") == []
    folder = Path("data/corpora/demo")
    folder.mkdir(parents=True)
    parts = {"validation": {"tokens": 512 * 8}, "test": {"tokens": 512 * 3 + 511}}
    domains = {"code": parts, "books": {"validation": {"tokens": 511}, "test": {"tokens": 512 * 8}}}
    domains["talk"] = {"validation": {"tokens": 0}, "test": {"tokens": 512 * 3}, "unseen": True}
    (folder / "manifest.json").write_text(json.dumps({"domains": domains}))
    assert plan.short_windows(config, "fine") == [
        "evaluate.windows = 8: the test part of code has 3 of 512 tokens",
        "evaluate.unseen_windows = 4: the test part of talk has 3 of 512 tokens",
        "pretrain.eval_windows = 2: the validation part of books has 0 of 512 tokens; raise its `heldout`, or lower "
        "seq_len: no run can be finished",
        "mixture.windows = 8: the validation part of books has 0 of 512 tokens; raise its `heldout`, or lower "
        "seq_len: no run can be finished",
    ]


def test_a_pruned_baseline_costs_what_its_size_says_and_is_shown_with_memory_disk_and_time(
    config: settings.Settings,
) -> None:
    without = changed(config, "pretrain")
    assert without.pruned is None
    fine = config.pipelines["fine"].model_copy(update={"control": "pruned"})
    both = config.model_copy(update={"pipelines": {"fine": fine}})
    dense = plan.dense_config(both, fine.model)
    cost = plan.plan(both, "fine", bfloat16=True)
    baseline = cost.pruned
    assert baseline is not None
    split = fine.partition
    width = (split.shared_experts + split.top_k) * 1536 // (split.shared_experts + split.experts)
    assert baseline.shape == {"intermediate_size": width}
    assert baseline.parameters == 134_515_008 - 30 * 3 * 576 * (1536 - width)
    shorter = fine.pretrain.model_copy(update={"tokens": fine.pretrain.tokens // 2, "eval_tokens": 1 << 20})
    longer = fine.pretrain.model_copy(update={"eval_tokens": 1 << 20})
    corpus = config.corpora[fine.corpus]
    half, whole = (
        plan.pruned_plan(dense, fine.model_copy(update={"pretrain": train}), corpus=corpus, bfloat16=True)
        for train in (shorter, longer)
    )
    assert half
    assert whole
    assert whole.flops - half.flops == pytest.approx(6 * baseline.parameters * fine.pretrain.tokens / 2, rel=0.25)
    assert baseline.memory.host["weights"] == 2 * baseline.parameters
    assert baseline.memory.host["optimizer"] == 12 * baseline.parameters
    assert cost.disk["pruned baseline, as cut and as trained"] == 2 * 4 * baseline.parameters
    assert cost.seconds(1e12) == pytest.approx(without.seconds(1e12) + baseline.flops / (plan.UTILISATION * 1e12))
    text = StringIO()
    for table in plan_view.figures(both, "fine", tflops=100.0):
        Console(file=text, width=160).print(table)
    assert f"FFNs of {width} neurons" in text.getvalue()
    assert "peak memory of its training" in text.getvalue()
    shape = settings.control.Shape(num_hidden_layers=20, num_key_value_heads=2, hidden_size=480)
    control = settings.Control(method="hard_concrete", shape=shape, tokens=102_400)
    masked = config.model_copy(
        update={"pipelines": {"fine": fine.model_copy(update={"control": control, "pretrain": longer})}}
    )
    planned = plan.plan(masked, "fine", bfloat16=True)
    pruned = planned.pruned
    assert pruned is not None
    masks = pruned.beside["its masks"]
    each = 3 * 480 * width + 2 * 480 * (6 + 2) * 64 + 2 * 480
    assert pruned.parameters == 20 * each + 480 + 49152 * 480
    assert masks.steps == 100
    assert masks.flops == pytest.approx(6 * 134_515_008 * 102_400, rel=0.3)
    assert masks.memory.host["weights"] == 2 * 134_515_008
    assert any(part.startswith("its masks: training checkpoints") for part in planned.disk)
    rarely = changed(config, "pretrain", eval_tokens=1 << 20)
    flops = rarely.seconds(1e12) + (pruned.flops + masks.flops) / (plan.UTILISATION * 1e12)
    assert planned.seconds(1e12) == pytest.approx(flops)
    for table in plan_view.figures(masked, "fine", tflops=100.0):
        Console(file=text, width=160).print(table)
    assert "20 layers, 6 heads, 2 of keys and values, 480 hidden dimensions" in text.getvalue()
    assert "FLOPs of 100 steps of the parent" in text.getvalue()
    refused = fine.model_copy(update={"partition": split.model_copy(update={"layers": "alternate"})})
    with pytest.raises(settings.SettingsError, match=r"control: pruned: partition.layers = 'alternate'"):
        plan.pruned_plan(dense, refused, corpus=corpus, bfloat16=True)

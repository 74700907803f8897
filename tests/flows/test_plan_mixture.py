"""What an estimate of domain weights costs, from its settings alone."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import plan, plan_mixture, plan_view
from flows.plan_mixture import MixturePlan
from tasks import settings
from tests.flows.conftest import ROOT

TOKENS, STEP = 10_000, 2 * 128
EACH = 10_240
"""TOKENS rounded up to whole steps."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded here, so the plan has the settings alone."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def config() -> settings.Settings:
    return settings.load(ROOT / "pipelines.yaml")


def with_mixture(config: settings.Settings, method: str, *, model: str = "scratch", **more: Any) -> settings.Settings:
    proxy = {
        "model": model,
        "tokens": TOKENS,
        "seq_len": 128,
        "batch": 2,
        "learning_rate": 1e-3,
        **more.pop("proxy", {}),
    }
    mixture = settings.Mixture(method=method, proxy=proxy, **more)
    demo = config.pipelines["demo"].model_copy(update={"mixture": mixture})
    return config.model_copy(update={"pipelines": {"demo": demo}})


def planned(config: settings.Settings, method: str, **more: Any) -> MixturePlan:
    found = plan.plan(with_mixture(config, method, **more), "demo", bfloat16=False).mixture
    assert found is not None
    return found


def test_a_method_that_trains_nothing_costs_nothing(config: settings.Settings) -> None:
    assert plan.plan(config, "demo", bfloat16=False).mixture is None


def test_a_swarm_costs_its_units_without_those_that_are_there(config: settings.Settings) -> None:
    swarm = {"units": 16}
    whole = planned(config, "regmix", swarm=swarm)
    assert (whole.trainings, whole.done, whole.tokens) == (16, 0, 16 * EACH)
    assert whole.share == pytest.approx(16 * EACH / config.pipelines["demo"].pretrain.tokens)
    folder = Path("runs/demo/swarm")
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.json").write_text("{}")
    left = planned(config, "olmix", swarm=swarm)
    assert (left.trainings, left.done, left.tokens) == (4, 12, 4 * EACH)
    assert left.flops == pytest.approx(whole.flops / 4)


def test_the_methods_that_move_weights_while_a_proxy_trains_cost_what_their_loops_add(
    config: settings.Settings,
) -> None:
    doge = planned(config, "doge", proxy={"windows": 1})
    assert (doge.trainings, doge.tokens) == (1, EACH)
    doremi = planned(config, "doremi", proxy={"windows": 1})
    assert (doremi.trainings, doremi.tokens) == (2, 2 * EACH)
    assert doremi.flops / doge.flops == pytest.approx(2 + 1 / 3, rel=0.02)
    towards = planned(config, "doge", proxy={"windows": 1}, target="docs")
    assert towards.flops / doge.flops == pytest.approx(1 + 1 / 4, rel=0.02)
    again = planned(config, "doremi", proxy={"windows": 1}, doremi={"rounds": 3}, seeds=2)
    assert (again.trainings, again.flops) == (12, 6 * doremi.flops)
    parts = planned(config, "doremi", proxy={"windows": 1, "micro_batch": 1})
    assert parts.flops / doge.flops == pytest.approx(2 + 2 / 3, rel=0.02)
    swept = planned(config, "aioli", proxy={"windows": 1})  # 20 steps: one sweep, five evaluations of four windows
    assert swept.flops / doge.flops == pytest.approx(1 + 5 * 4 * 128 / 3 / EACH, rel=0.02)


def test_a_proxy_of_the_first_layers_costs_those_layers_and_the_plan_shows_all_of_it(
    config: settings.Settings,
) -> None:
    student, parent = (
        planned(config, "doge", model=model, proxy={"layers": layers})
        for model, layers in (("student", None), ("parent", 15))
    )
    assert student.flops_share == pytest.approx(EACH / 24_576, rel=0.25)
    assert parent.flops < student.flops
    text = StringIO()
    swarm = with_mixture(config, "olmix", model="student", proxy={"layers": 6}, swarm={"units": 20})
    for table in plan_view.figures(swarm, "demo", tflops=100.0):
        Console(file=text, width=160).print(table)
    shown = " ".join(text.getvalue().split())
    assert "20 trainings │ of a proxy: the converted model, 6 layers of 576" in shown
    assert f"204.8 k │ tokens of proxies, {20 * EACH / 24_576:.1%} of the training tokens" in shown
    assert "of which the estimate of domain weights" in shown
    cost = plan.plan(swarm, "demo", bfloat16=False)
    assert cost.mixture
    static = plan.plan(config, "demo", bfloat16=False)
    extra = cost.mixture.flops / (plan.UTILISATION * 1e12)
    assert cost.seconds(1e12) == pytest.approx(static.seconds(1e12) + extra)


def test_a_scratch_proxy_has_the_parents_vocabulary(config: settings.Settings) -> None:
    proxy = settings.Proxy(model="scratch", tokens=1, learning_rate=1e-3)
    made = plan_mixture.proxy_config(proxy, dense={"vocab_size": 777}, sparse={})
    assert (made["vocab_size"], made["num_hidden_layers"]) == (777, 4)

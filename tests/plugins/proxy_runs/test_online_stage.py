"""The stage with proxies that estimate while they train: evidence that adds up, kill -9, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks import settings
from tasks.mixture import __main__ as stage
from tasks.mixture import methods
from tasks.plugins.aioli import estimator as aioli
from tasks.plugins.doge import estimator as doge
from tasks.plugins.doremi import estimator as doremi
from tasks.plugins.proxy_runs import course
from tasks.pretrain.job import Diverged
from tests.pretrain import warm_stages
from tests.pretrain.projects import wait_for

ROOT = Path(__file__).parents[3]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture
def proxy_folder(proxy_folder: Path) -> Path:
    """Prose, code, and little texts that are never trained on; the settings are the test's own."""
    text = Path("pipelines.yaml").read_text()
    Path("pipelines.yaml").unlink()
    Path("pipelines.yaml").write_text(text)
    return proxy_folder


def edit(change: Any) -> None:
    path, yaml = Path("pipelines.yaml"), YAML()
    content = yaml.load(path)
    change(content)
    yaml.dump(content, path)


def configure(*, steps: int = 24, **mixture: Any) -> None:
    """Settings of the mixture, and of a tiny proxy from scratch of so many steps of eight windows."""
    proxy = {"model": "scratch", "shape": SHAPE, "tokens": steps * 8 * 64, "seq_len": 64, "batch": 7, "windows": 2,
             "learning_rate": 1e-2}  # fmt: skip
    given = {"proxy": proxy, "max_epochs": 500.0} | mixture

    def change(content: Any) -> None:
        content["pipelines"]["tiny"]["mixture"] = {name: value for name, value in given.items() if value is not None}
        content["pipelines"]["tiny"]["pretrain"].pop("dynamic", None)

    edit(change)


def estimated() -> dict[str, Any]:
    written: dict[str, Any] = json.loads(stage.run("tiny").read_text())
    assert sum(written["weights"].values()) == pytest.approx(1)
    assert min(written["weights"].values()) > 0
    return written


def test_every_method_shows_its_course_and_counts_what_it_took(proxy_folder: Path) -> None:
    configure(method="doremi", doremi={"rounds": 2})
    made = {"doremi": estimated()}
    configure(method="doge", seeds=2, target={"words": 1.0, "code": 0.0})
    made["doge"] = estimated()
    configure(method="aioli", target="words")
    made["aioli"] = estimated()

    one, budget = 24 * 8 * 64, 1536
    tokens = {"doremi": 4 * one, "doge": 2 * one, "aioli": one}
    for name, written in made.items():
        evidence = written["evidence"]
        assert (written["method"], written["seed"]) == (name, 0)
        assert evidence["cost"]["tokens"] == tokens[name]
        assert evidence["cost"]["share_of_training"] == pytest.approx(tokens[name] / budget)
        assert all(sum(point["weights"].values()) == pytest.approx(1) for point in evidence["trajectory"])
    # A training of the reference and one of the proxy a round, and a third of one for the reference's forward passes.
    flops = made["doremi"]["evidence"]["cost"]["flops"] / (4 + 2 / 3)
    assert made["doge"]["evidence"]["cost"]["flops"] > 2 * flops
    assert flops < made["aioli"]["evidence"]["cost"]["flops"] < 2 * flops
    steps = {name: [point["step"] for point in written["evidence"]["trajectory"]] for name, written in made.items()}
    assert steps["doremi"] == [*range(1, 49)]
    assert steps["doge"] == [*range(1, 25)]
    assert steps["aioli"] == [0, 4, 8]
    assert "spread" not in made["aioli"]["evidence"]
    assert made["doge"]["evidence"]["spread_over"] == "seeds"
    assert all(value > 0 for value in made["doge"]["evidence"]["spread"].values())
    left = {path.name for path in Path(".scratch").glob("mixture-tiny/*/courses/*/*")}
    assert "done.json" in left
    assert not left & {"checkpoints", "trained"}


def test_a_stage_killed_in_its_second_training_ends_with_the_mixture_of_one_that_was_not(proxy_folder: Path) -> None:
    configure(method="doremi")
    for name in ("tasks", "kernels"):
        Path(name).symlink_to(ROOT / name)  # what the stage's process imports
    started = warm_stages.start("tasks.mixture", "tiny", cwd=proxy_folder)
    courses = Path(".scratch/mixture-tiny")
    wait_for(lambda: [*courses.glob("*/courses/*/done.json")] and [*courses.glob("*/courses/*/checkpoints/step-*")])
    started.process.kill()
    started.wait()
    assert len([*courses.glob("*/courses/*")]) == 2
    assert not Path("runs/tiny/mixture.json").exists()
    killed = stage.run("tiny").read_bytes()
    assert "going on from the checkpoint" in "".join(
        path.read_text() for path in courses.glob("*/courses/*/output.txt")
    )
    for path in courses.glob("*/courses/*/done.json"):
        path.unlink()
    assert stage.run("tiny").read_bytes() == killed


def test_a_mix_of_nearly_one_domain_is_printed_as_a_warning(
    proxy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(method="doremi")
    problem = replace(stage.problem_of("tiny"), work=Path("work"))
    folder = problem.work / "courses/one"
    folder.mkdir(parents=True)
    made = course.Course(
        weights={"prose": 0.97, "code": 0.03}, trajectory=[], steps=1, tokens=1, flops=1.0, folder=folder
    )
    for method, advice in (("doremi", "; or lower mixture.doremi.step_size"), ("doge", "\n")):
        course.estimate(problem, method=method, means=[made.weights], trajectory=[], courses=[made])
        assert f"warning: {method} gives prose 0.97 of the mix. Train the proxy on more tokens{advice}" in (
            capsys.readouterr().out
        )


def test_what_an_estimator_cannot_weigh_is_refused_by_name_before_anything_is_trained(proxy_folder: Path) -> None:
    configure(method="doge")
    problem = stage.problem_of("tiny")
    for estimate in (doremi.estimate, doge.estimate, aioli.estimate):
        with pytest.raises(ValueError, match="has code alone; set method: uniform"):
            estimate(replace(problem, tokens={"code": 5}))
    assert problem.proxy
    long = problem.proxy.model_copy(update={"seq_len": 10**6})
    with pytest.raises(ValueError, match=r"code, prose has not one training window of mixture.proxy.seq_len"):
        course.prepare(replace(problem, proxy=long), method="doge")
    with pytest.raises(ValueError, match="the prior of code is 0, and its logarithm is taken"):
        doremi.estimate(replace(problem, weights={"code": 0.0, "prose": 1.0}, work=Path("work")))
    with pytest.raises(ValueError, match=r"mixture.weights must name exactly .* not in the corpus: poems"):
        methods.estimate("doremi", replace(problem, weights={"code": 1.0, "poems": 1.0}))
    with pytest.raises(ValueError, match=r"mixture.proxy.tokens give 5 steps, and a sweep over 3 domains"):
        aioli.plan(5, domains=3)
    assert not [*Path().glob("work/courses")]


def test_a_proxy_that_diverges_names_the_setting_to_lower(proxy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(method="doge")
    edit(lambda content: content["pipelines"]["tiny"]["mixture"]["proxy"].update(learning_rate=1e30))
    with pytest.raises(Diverged, match=r"the proxy of doge diverges: .*; lower mixture.proxy.learning_rate"):
        stage.run("tiny")


@pytest.mark.parametrize(
    ("steps", "domains", "expected"),
    [(5000, 7, (20, 4, 4)), (300, 7, (5, 1, 4)), (100, 4, (3, 1, 4)), (20, 7, (1, 1, 1)), (1000, 2, (20, 3, 4))],
)
def test_aiolis_rounds_fit_the_budget_and_are_the_papers_in_a_large_one(
    steps: int, domains: int, expected: tuple[int, int, int]
) -> None:
    made = aioli.plan(steps, domains=domains)
    assert (made.updates, made.sweeps, made.sweep_steps) == expected
    assert made.updates * made.sweeps * made.sweep_steps * domains * 2 <= steps


def test_a_trajectory_is_shown_at_few_points_its_last_among_them() -> None:
    assert course.thinned([*range(7)]) == [*range(7)]
    shown = course.thinned([*range(1001)])
    assert len(shown) <= course.POINTS
    assert shown[-1] == 1000
    assert course.thinned([]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "doremi", "target": "code"}, "method `doremi` takes no `target`"),
        ({"method": "doge", "doremi": {"rounds": 2}}, "method `doge` takes no `doremi`"),
        ({"method": "uniform", "seeds": 3, "proxy": None}, "method `uniform` takes no `seeds`"),
        ({"method": "doremi", "weights": {"a": 0.0, "b": 1.0}}, r"weights.a = 0: they are the prior"),
    ],
)
def test_settings_that_a_method_does_not_read_are_refused(fields: dict[str, Any], message: str) -> None:
    proxy = {"model": "scratch", "tokens": 1024, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match=message):
        settings.Mixture(**{"proxy": proxy} | fields)

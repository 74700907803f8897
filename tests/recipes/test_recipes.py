"""Each recipe is valid, is the published one, and can be planned without anything downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import cli, plan
from tasks import settings

RECIPES = Path(__file__).parent.parent.parent / "recipes"
PAPER = {  # (experts, top_k): neurons, active parameters (billions), scale
    (16, 2): (688, 2.955, 8),
    (16, 4): (688, 3.496, 4),
    (8, 2): (1376, 3.494, 4),
}


def recipe(experts: int, top_k: int) -> tuple[settings.Settings, str]:
    name = f"llama-2-7b-random-{top_k}of{experts}"
    return settings.load(RECIPES / f"{name}.yaml"), name


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_can_be_pasted_into_the_project_and_planned(path: Path) -> None:
    """Its entries join those of pipelines.yaml; one that is there already is the same, and the whole is valid."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    ours, theirs = yaml.load((RECIPES.parent / "pipelines.yaml").read_text()), yaml.load(path.read_text())
    assert list(theirs) == ["models", "corpora", "pipelines"]
    for section, entries in theirs.items():
        assert all(ours[section].get(name, entry) == entry for name, entry in entries.items())
        ours[section] |= entries
    assert path.stem in settings.validate(ours).pipelines

    result = CliRunner().invoke(cli.app, ["plan", path.stem, "--file", str(path), "--tflops", "312"])
    assert result.exit_code == 0, result.output
    assert "training tokens" in result.stdout
    assert ("put an address of yours there" in result.stdout.replace("\n", " ")) == ("YOUR-NAME" in path.read_text())
    assert CliRunner().invoke(cli.app, ["plan", str(path), "--tflops", "312"]).stdout == result.stdout


@pytest.mark.parametrize("path", sorted((RECIPES / "corpora").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_corpus_can_be_pasted_into_the_project(path: Path) -> None:
    ours, theirs = settings.read(RECIPES.parent / "pipelines.yaml"), settings.read(path)
    assert list(theirs) == ["corpora"]
    assert not set(ours["corpora"]) & set(theirs["corpora"])
    ours["corpora"] |= theirs["corpora"]
    assert path.stem in settings.validate(ours).corpora


@pytest.mark.parametrize("sizes", PAPER)
def test_sizes_are_the_published_ones(sizes: tuple[int, int]) -> None:
    """Total 6.74 billion; active within 0.1 %: the authors' gate has a second layer and a noise matrix."""
    neurons, active, _ = PAPER[sizes]
    cost = plan.plan(*recipe(*sizes), bfloat16=True)
    assert cost.sparse["total"] == pytest.approx(6.74e9, rel=1e-3)
    assert cost.sparse["active"] == pytest.approx(active * 1e9, rel=1e-3)
    assert cost.expert_width == neurons


@pytest.mark.parametrize("sizes", PAPER)
def test_training_is_the_published_one(sizes: tuple[int, int]) -> None:
    config, name = recipe(*sizes)
    pipeline = config.pipeline(name)
    train = pipeline.pretrain
    assert train.steps == 13_623
    assert train.tokens == train.steps * train.batch * train.seq_len == pytest.approx(200e9, rel=1e-3)
    assert train.batch // (train.micro_batch * train.processes) == 4  # gradient accumulation
    assert (train.learning_rate, train.final_lr_share, train.warmup_steps) == (2e-4, 0.1, 100)
    assert (train.betas, train.weight_decay, train.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (train.precision, train.zero_stage, train.processes) == ("bfloat16", 1, 112)
    partition = pipeline.partition
    assert (partition.method, partition.scale) == ("random", "paper")
    assert partition.experts / partition.top_k == PAPER[sizes][2]


def test_the_three_differ_only_in_their_experts() -> None:
    pipelines = [config.pipeline(name) for config, name in (recipe(*sizes) for sizes in PAPER)]
    rest = [pipeline.model_dump(exclude={"partition": {"experts", "top_k"}}) for pipeline in pipelines]
    assert rest[0] == rest[1] == rest[2]


def test_domain_weights_are_those_published_for_the_static_mixture() -> None:
    config, name = recipe(16, 4)
    weights = config.pipeline(name).mixture.weights
    assert weights == {
        "cc": 0.361, "c4": 0.492, "github": 0.008, "wikipedia": 0.031, "book": 0.091, "arxiv": 0.007,
        "stackexchange": 0.01,
    }  # fmt: skip
    assert set(weights) == set(config.corpus("slimpajama").domains)
    assert sum(weights.values()) == pytest.approx(1)


def test_flops_agree_with_the_estimate_from_active_parameters() -> None:
    """6 x 3.5e9 x 200e9 = 4.2e21 leaves out attention scores, which at 4096 tokens add a quarter."""
    cost = plan.plan(*recipe(16, 4), bfloat16=True)
    assert 4.2e21 < cost.train_flops < 1.3 * 4.2e21


def test_the_modern_recipe_has_the_sizes_of_its_parent() -> None:
    cost = plan.plan(settings.load(RECIPES / "llama-3-2-1b-shared.yaml"), "llama-3-2-1b-shared", bfloat16=True)
    assert cost.dense["total"] == 1_235_814_400  # numel() of meta-llama/Llama-3.2-1B
    assert cost.expert_width == 128
    assert not [each.engine for each in cost.engines if each.refused or each.slow]
    assert cost.sparse["active"] < 0.7 * cost.sparse["total"]


def test_the_long_run_has_a_million_tokens_seven_domains_and_both_controls() -> None:
    path = RECIPES / "long.yaml"
    config = settings.load(path)
    assert settings.read(path)["corpora"] == settings.read(RECIPES / "corpora/wide.yaml")["corpora"]
    assert len([domain for domain in config.corpus("wide").domains.values() if not domain.unseen]) == 7
    pipeline = config.pipeline("long")
    assert pipeline.pretrain.tokens == pipeline.pretrain.steps * 2048 == 2**20
    assert (pipeline.control.method, pipeline.control.parent) == ("static", True)
    cost = plan.plan(config, "long", bfloat16=True)
    assert cost.sparse["active"] == pytest.approx(94.8e6, rel=0.01)  # the demo's

"""The stage with real proxies: killed, resumed, shared out, and evidence that adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks.mixture import __main__ as stage
from tasks.plugins.olmix import estimator as olmix
from tasks.plugins.regmix import estimator as regmix
from tests.corpus import texts
from tests.pretrain import warm_stages
from tests.pretrain.projects import wait_for

SWARM = Path("runs/tiny/swarm")


@pytest.fixture
def project(tiny_project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny project with model and corpus, whose pipeline asks for olmix on a tiny proxy from scratch."""
    for module in (olmix, regmix):
        monkeypatch.setattr(module, "BOOTSTRAPS", 3)
    configure(method="olmix")
    Path("data/models").mkdir(parents=True)
    Path("data/models/tiny").symlink_to(tiny_model)
    texts.run()
    return tiny_project


def configure(**mixture: object) -> None:
    path = Path("pipelines.yaml")
    yaml = YAML()
    content = yaml.load(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    proxy = {"model": "scratch", "shape": shape, "tokens": 1024, "seq_len": 64, "batch": 8, "learning_rate": 1e-2,
             "windows": 2}  # fmt: skip
    content["pipelines"]["tiny"]["mixture"] = {"proxy": proxy, "swarm": {"units": 8}, "max_epochs": 50.0} | mixture
    content["pipelines"]["tiny"]["pretrain"].pop("dynamic", None)
    yaml.dump(content, path)


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in SWARM.glob("*.json")}


def test_a_stage_killed_at_any_unit_ends_with_the_weights_and_files_of_one_that_was_not(project: Path) -> None:
    started = warm_stages.start("tasks.mixture", "tiny", cwd=project)
    wait_for(lambda: len(files()) >= 2)
    started.process.kill()
    started.wait()
    before = files()
    assert 2 <= len(before) < 8
    stage.run("tiny")
    written = json.loads(Path("runs/tiny/mixture.json").read_text())
    killed = files()
    assert before.items() <= killed.items()
    for path in SWARM.iterdir():
        path.unlink()
    assert stage.share("tiny", run=lambda train, units: [*map(train, units)], index=1, count=2) == 4
    assert len(files()) == 4
    stage.run("tiny")
    assert json.loads(Path("runs/tiny/mixture.json").read_text()) == written
    assert files() == killed
    assert list(Path(".scratch").glob("mixture-tiny/*/units")) == []

    evidence = written["evidence"]
    assert (written["method"], written["seed"], len(evidence["units"])) == ("olmix", 0, 8)
    assert sum(written["weights"].values()) == pytest.approx(1)
    assert evidence["cost"]["tokens"] == 8 * 1024
    assert evidence["cost"]["share_of_training"] == pytest.approx(8 * 1024 / 1536)
    assert evidence["fit"]["units"] == 8
    assert all(unit["losses"].keys() == {"prose", "code"} for unit in evidence["units"])

    # The second method reads the same units.
    configure(method="regmix")
    stage.run("tiny")
    assert json.loads(Path("runs/tiny/mixture.json").read_text())["method"] == "regmix"
    assert files().keys() == killed.keys()
    configure(method="uniform", proxy=None, swarm=None)
    stage.run("tiny")
    assert files().keys() == killed.keys()


def test_a_share_that_cannot_be_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(method="uniform", proxy=None, swarm=None)
    with pytest.raises(ValueError, match=r"pipelines.tiny.mixture has no `swarm`"):
        stage.share("tiny", run=map)
    monkeypatch.setattr(sys, "argv", ["mixture", "tiny", "--task-index", "2", "--num-tasks", "2"])
    with pytest.raises(SystemExit):
        stage.main()
    assert "--task-index 2 is not one of 0 to 1" in capsys.readouterr().err

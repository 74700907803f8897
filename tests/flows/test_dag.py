"""dvc.yaml says what it should, and flows/dag.py reads it as DVC does."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import dag
from tasks import code, settings
from tests.flows.conftest import JOBS, ROOT, ran, repro

RAW: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, Any] = {name: entry["do"] for name, entry in RAW["stages"].items()}
CODE = {name: entry for name, entry in STAGES.items() if entry["cmd"].startswith(dag.DIGESTS_CODE)}


def test_every_stage_depends_on_the_digests_of_its_own_module_and_on_no_source_file() -> None:
    for name, entry in STAGES.items():
        if name in CODE:
            assert entry["deps"] == ["kernels/moe_kernels", "tasks"], name
            continue
        assert not [dep for dep in entry["deps"] if dep.startswith(("tasks", "kernels"))], name
        (dep,) = (Path(dep) for dep in entry["deps"] if dep.startswith("data/code/"))
        python, module = entry["cmd"].split()[:-1][:2], entry["cmd"].split()[2]
        assert (python, dep.name) == (["python", "-m"], f"{module}.json"), name
        (digesting,) = (code for code in CODE.values() if code["outs"] == [str(dep.parent)])
        assert module in digesting["cmd"].removeprefix(dag.DIGESTS_CODE).split()
        assert digesting["cmd"].removeprefix(dag.DIGESTS_CODE).split()[0] == str(dep.parent)


def tracked() -> dict[str, set[str]]:
    """{stage: keys of pipelines.yaml that it tracks}, with ${key} and ${item.…} as they stand."""
    return {
        name: {key for param in entry.get("params", ()) for key in param["pipelines.yaml"]}
        for name, entry in STAGES.items()
    }


def test_every_tracked_key_exists() -> None:
    raw = YAML(typ="safe", pure=True).load((ROOT / "pipelines.yaml").read_text())
    for keys in tracked().values():
        for key in keys:
            section, _, rest = key.partition(".")
            for name, entry in raw[section].items():
                rest_of_entry = rest.replace("${key}", name).partition(".")[2]
                if "${item." in rest:
                    continue  # models.${item.model}: settings.py checks that it is defined
                value: Any = entry
                for part in filter(None, rest_of_entry.split(".")):
                    value = value[part]


def test_every_field_of_settings_is_tracked_and_a_section_by_the_stage_of_its_name() -> None:
    sections = {"mixture", "partition", "pretrain", "evaluate"}
    assert set(settings.Pipeline.model_fields) == {"model", "corpus", "control", *sections}
    assert all(f"pipelines.${{key}}.{section}" in tracked()[section] for section in sections)
    assert {"models.${key}", "corpora.${key}", "pipelines.${key}"} <= set().union(*tracked().values())


def test_metrics_and_plots_are_declared_and_stay_in_git() -> None:
    declared = {
        str(path): options
        for entry in STAGES.values()
        for kind in ("metrics", "plots")
        for item in entry.get(kind, [])
        for path, options in item.items()
    }
    names = ("mixture", "partition", "pretrain", "control", "evaluation")
    for path in (*(f"{name}.json" for name in names), "mixture.csv", "loss.csv", "validation.csv"):
        assert declared[f"runs/${{key}}/{path}"]["cache"] is False
    for path in ("data/models/${key}.json", "data/corpora/${key}.json"):
        assert declared[path]["cache"] is False
    assert declared["runs/${key}/loss.csv"]["x"] == "step"


def test_what_is_no_metric_and_no_plot_stays_out_of_git() -> None:
    outs = [(name, out) for name, entry in STAGES.items() for out in entry.get("outs", [])]
    assert len(outs) > 10
    options = [(name, next(iter(out.values()))) for name, out in outs if not isinstance(out, str)]
    in_git = [name for name, said in options if said.get("cache") is False]
    assert in_git == ["sources"]  # a line a domain; the rest may be a table of 35,000 lines


def test_meta_holds_only_what_the_flow_reads() -> None:
    assert set().union(*(entry.get("meta", {}) for entry in STAGES.values())) <= dag.META


def test_every_deployment_names_a_flow_whose_parameters_fit() -> None:
    raw = YAML(typ="safe", pure=True).load((ROOT / "pipelines.yaml").read_text())
    assert len(raw["deployments"]) >= 2
    for deployment in raw["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        assert f"{flow.name}" == name
        inspect.signature(flow.fn).bind(**deployment["parameters"])
        flow.validate_parameters(deployment["parameters"])
        assert "pull" not in deployment  # with it, a worker of a process pool runs in an empty folder


def test_the_real_graph_leads_from_the_model_to_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = {stage.name: stage for stage in dag.ancestors("report@demo")}
    assert list(stages)[-1] == "report@demo"
    assert set(stages) == {
        "model@smollm2-135m-q4", "sources@demo", "corpus@demo", "mixture@demo", "partition@demo", "pretrain@demo",
        "control@demo", "evaluate@demo", "report@demo",
    }  # fmt: skip
    parents = ("corpus@demo", "mixture@demo", "model@smollm2-135m-q4", "partition@demo")
    assert stages["pretrain@demo"].needs == parents
    assert stages["pretrain@demo"].gpu
    parents = ("corpus@demo", "mixture@demo", "model@smollm2-135m-q4", "pretrain@demo")
    assert stages["control@demo"].needs == parents
    assert "control@demo" in stages["evaluate@demo"].needs
    assert "control@demo" in stages["report@demo"].needs
    assert stages["model@smollm2-135m-q4"].retries == 2
    assert Path("runs/demo/pretrain.json") in stages["pretrain@demo"].metrics
    assert Path("runs/demo/loss.csv") in stages["pretrain@demo"].in_git


class TestReading:
    """The contract with dvc.repo.Repo."""

    def test_ancestors_alone_are_taken_each_after_those_it_needs_and_light_ones_first(self, toy: Path) -> None:
        stages = dag.ancestors("report@toy")
        order = [stage.name for stage in stages]
        for stage in stages:
            assert all(order.index(need) < order.index(stage.name) for need in stage.needs)
        assert order[:3] == ["model@toy", "sources@toy", "corpus@toy"]
        assert [stage.name for stage in dag.ancestors("corpus@toy")] == order[:3]

    def test_an_unknown_target_names_the_known_ones(self, toy: Path) -> None:
        with pytest.raises(dag.GraphError, match=r"no stage 'report@demo'; it has control@toy, .*report@toy"):
            dag.ancestors("report@demo")

    def test_an_unknown_meta_key_is_refused(self, toy: Path) -> None:
        file = toy / "dvc.yaml"
        file.write_text(file.read_text().replace("{retries: 1}", "{retry: 1}"))
        with pytest.raises(dag.GraphError, match=r"meta\.retry is unknown; allowed: gpu, retries, timeout"):
            dag.ancestors("report@toy")

    def test_a_broken_dvc_yaml_is_a_clear_error(self, toy: Path) -> None:
        (toy / "dvc.yaml").write_text("stages: [")
        with pytest.raises(dag.GraphError, match=r"dvc\.yaml"):
            dag.ancestors("report@toy")

    def test_a_clone_without_data_tells_what_is_missing(self, toy: Path) -> None:
        why = dag.changes(["model@toy", "report@toy"])
        assert why == {"model@toy": ["never run"], "report@toy": ["never run"]}

    def test_an_up_to_date_project_has_no_reasons_and_dvc_repro_runs_nothing(self, done_toy: Path) -> None:
        names = [stage.name for stage in dag.ancestors("report@toy")]
        assert not any(dag.changes(names).values())
        repro(done_toy)
        assert ran(done_toy) == []

    def test_reasons_name_settings_dependencies_and_outputs(self, done_toy: Path) -> None:
        file = done_toy / "pipelines.yaml"
        file.write_text(file.read_text().replace("license: none}\ncorpora", "license: other}\ncorpora"))
        (done_toy / "source.txt").write_text("other texts")
        (done_toy / "runs/toy/mixture.json").unlink()
        why = dag.changes([stage.name for stage in dag.ancestors("report@toy")])
        assert why["model@toy"] == ["setting models.toy: modified"]
        assert why["sources@toy"] == ["dependency source.txt: modified"]
        assert why["mixture@toy"] == ["output runs/toy/mixture.json: deleted"]
        assert why["corpus@toy"] == []

    def test_changed_code_is_named_by_module_and_a_reworded_comment_is_no_change(self, done_toy: Path) -> None:
        names = [stage.name for stage in dag.ancestors("report@toy")]
        lock = (done_toy / "dvc.lock").read_bytes()
        for job in (done_toy / "jobs").iterdir():
            with job.open("a") as file:
                file.write("# a remark\n")
        assert not any(dag.changes(names).values())
        (done_toy / "jobs/shared.py").write_text("VALUE = 2\n")
        why = dag.changes(names)
        assert set(map(tuple, why.values())) == {("code: jobs.shared modified",)}
        assert (done_toy / "dvc.lock").read_bytes() == lock  # who only asks changes nothing
        dag.refresh_code(names)
        assert (done_toy / "dvc.lock").read_bytes() != lock
        assert dag.changes(names) == why
        (done_toy / "jobs/shared.py").write_text("VALUE = 1\n")
        (done_toy / "jobs/pretrain.py").write_text("import jobs.shared\nif VALUE = 1:\n")
        with pytest.raises(code.CodeError, match=r"jobs/pretrain\.py:2: invalid syntax"):
            dag.changes(names)
        with pytest.raises(dag.StageError, match=r"code@toy"):
            dag.refresh_code(names)

    def test_a_reworded_comment_re_runs_only_the_digests_by_dvc_repro(self, done_toy: Path) -> None:
        for text, stages in (("VALUE = 1  # one\n", []), ("VALUE = 2\n", sorted(JOBS))):
            (done_toy / "jobs/shared.py").write_text(text)
            repro(done_toy)
            assert sorted(ran(done_toy)) == stages
        (done_toy / "jobs/pretrain.py").write_text("from jobs import shared\nshared.VALUE = 3\n")
        repro(done_toy)
        assert ran(done_toy) == ["pretrain"]  # its output is what it was

    def test_short_and_full_stage_names_resolve(self, toy: Path) -> None:
        stages = dag.ancestors("report@toy")
        assert dag.resolve(["pretrain", "model@toy"], stages=stages) == {"pretrain@toy", "model@toy"}


def test_the_toy_is_built_like_the_real_graph(templates: dict[str, Path]) -> None:
    toy = YAML(typ="safe", pure=True).load((templates["new"] / "dvc.yaml").read_text())["stages"]
    assert list(toy) == list(STAGES)
    assert [entry["foreach"] for entry in toy.values()] == [entry["foreach"] for entry in RAW["stages"].values()]

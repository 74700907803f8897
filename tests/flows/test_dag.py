"""dvc.yaml says what it should, and flows/dag.py reads it as DVC does."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import dag
from tasks import settings
from tests.flows.conftest import ROOT, ran, repro

STAGES: dict[str, Any] = {
    name: entry["do"]
    for name, entry in YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"].items()
}
PACKAGES = {"tasks": ROOT, "flows": ROOT, "moe_kernels": ROOT / "kernels"}


def module_file(name: str) -> Path | None:
    """The file of a module of this project, or None for anything else."""
    top = name.partition(".")[0]
    if top not in PACKAGES:
        return None
    base = PACKAGES[top].joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imports(path: Path) -> set[Path]:
    """Files of this project that a file imports anywhere, lazily too, but not for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    names = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    parents = [name.rpartition(".")[0] for name in names]
    return {file for name in [*names, *parents] if (file := module_file(name))}


def has_code(path: Path) -> bool:
    """False for a file that holds at most a docstring."""
    return not all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def closure(path: Path) -> set[Path]:
    found, todo = set(), {path}
    while todo:
        file = todo.pop()
        found.add(file)
        todo |= imports(file) - found
    return found


def stage_module(command: str) -> Path:
    """The file that `python -m MODULE ${key}` runs."""
    name = command.split()[2]
    path = module_file(f"{name}.__main__") or module_file(name)
    assert path, f"no module {name}"
    return path


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_every_file_that_its_module_imports(name: str) -> None:
    covered = [ROOT / dep for dep in STAGES[name]["deps"] if "${" not in dep]
    missing = [
        str(file.relative_to(ROOT))
        for file in closure(stage_module(STAGES[name]["cmd"]))
        if has_code(file) and not any(file == dep or file.is_relative_to(dep) for dep in covered)
    ]
    assert not sorted(missing), f"dvc.yaml: add to the deps of {name}: {sorted(missing)}"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_import(name: str) -> None:
    """A dependency too many runs a stage again for nothing."""
    files = closure(stage_module(STAGES[name]["cmd"]))
    idle = [
        dep
        for dep in STAGES[name]["deps"]
        if "${" not in dep and not any(file == ROOT / dep or file.is_relative_to(ROOT / dep) for file in files)
    ]
    assert not idle, f"dvc.yaml: {name} imports nothing of {idle}"


def test_the_closure_follows_lazy_and_relative_imports_and_skips_those_for_type_checking() -> None:
    """The test of the test."""
    files = {str(file.relative_to(ROOT)) for file in closure(stage_module(STAGES["partition"]["cmd"]))}
    expected = {"tasks/settings/__init__.py", "tasks/scratch.py", "tasks/moe/streamed.py"}
    expected |= {"kernels/moe_kernels/cpu.py"}
    assert expected <= files
    assert not any(file.startswith(("flows/", "tasks/evaluate/")) for file in files)


def tracked() -> dict[str, set[str]]:
    """{stage: keys of pipelines.yaml that it tracks}, with ${key} and ${item.…} as they stand."""
    return {
        name: {key for param in entry["params"] for key in param["pipelines.yaml"]} for name, entry in STAGES.items()
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


@pytest.mark.parametrize("section", ["mixture", "partition", "pretrain", "evaluate"])
def test_every_section_of_a_pipeline_is_tracked_by_the_stage_of_its_name(section: str) -> None:
    assert section in settings.Pipeline.model_fields
    assert f"pipelines.${{key}}.{section}" in tracked()[section]


def test_every_field_of_settings_is_tracked_by_some_stage() -> None:
    keys = set().union(*tracked().values())
    assert {"models.${key}", "corpora.${key}", "pipelines.${key}"} <= keys
    assert set(settings.Pipeline.model_fields) == {"model", "corpus", "mixture", "partition", "pretrain", "evaluate"}


def test_metrics_and_plots_are_declared_and_stay_in_git() -> None:
    declared = {
        str(path): options
        for entry in STAGES.values()
        for kind in ("metrics", "plots")
        for item in entry.get(kind, [])
        for path, options in item.items()
    }
    for path in ("mixture.json", "partition.json", "pretrain.json", "evaluation.json", "loss.csv", "validation.csv"):
        assert declared[f"runs/${{key}}/{path}"]["cache"] is False
    for path in ("data/models/${key}.json", "data/corpora/${key}.json"):
        assert declared[path]["cache"] is False
    assert declared["runs/${key}/loss.csv"]["x"] == "step"


def test_what_is_no_metric_and_no_plot_stays_out_of_git() -> None:
    outs = [(name, out) for name, entry in STAGES.items() for out in entry.get("outs", [])]
    assert len(outs) > 10
    in_git = [name for name, out in outs if not isinstance(out, str)]
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
        "evaluate@demo", "report@demo",
    }  # fmt: skip
    parents = ("corpus@demo", "mixture@demo", "model@smollm2-135m-q4", "partition@demo")
    assert stages["pretrain@demo"].needs == parents
    assert stages["pretrain@demo"].gpu
    assert stages["model@smollm2-135m-q4"].retries == 2
    assert Path("runs/demo/pretrain.json") in stages["pretrain@demo"].metrics
    assert Path("runs/demo/loss.csv") in stages["pretrain@demo"].in_git


class TestReading:
    """The contract with dvc.repo.Repo."""

    def test_stages_come_after_those_they_need_and_light_ones_first(self, toy: Path) -> None:
        stages = dag.ancestors("report@toy")
        order = [stage.name for stage in stages]
        for stage in stages:
            assert all(order.index(need) < order.index(stage.name) for need in stage.needs)
        assert order[:3] == ["model@toy", "sources@toy", "corpus@toy"]

    def test_only_ancestors_are_taken(self, toy: Path) -> None:
        assert [stage.name for stage in dag.ancestors("corpus@toy")] == ["model@toy", "sources@toy", "corpus@toy"]

    def test_an_unknown_target_names_the_known_ones(self, toy: Path) -> None:
        with pytest.raises(dag.GraphError, match=r"no stage 'report@demo'; it has corpus@toy, .*report@toy"):
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

    def test_short_and_full_stage_names_resolve(self, toy: Path) -> None:
        stages = dag.ancestors("report@toy")
        assert dag.resolve(["pretrain", "model@toy"], stages=stages) == {"pretrain@toy", "model@toy"}


def test_the_toy_is_built_like_the_real_graph(templates: dict[str, Path]) -> None:
    toy = YAML(typ="safe", pure=True).load((templates["new"] / "dvc.yaml").read_text())["stages"]
    assert list(toy) == list(STAGES)
    assert json.dumps([entry["foreach"] for entry in toy.values()]).count("pipelines") == 5

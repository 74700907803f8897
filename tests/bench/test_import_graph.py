"""The import graph of this project is in order, and each fault of one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import import_graph
from tasks.code import Project

ROOT = Path(__file__).parent.parent.parent


def test_this_project_has_no_circle_and_no_upward_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert import_graph.main([]) == 0
    printed = capsys.readouterr().out
    assert "circles: none\nupward imports: none\n" in printed
    assert "moe_kernels: " in printed
    assert "; imports nothing" in printed


@pytest.mark.parametrize(
    ("files", "printed"),
    [
        (
            {"tasks/moe/a.py": "from tasks.moe import b", "tasks/moe/b.py": "def f():\n    import tasks.moe.a"},
            "circles: 1\n    tasks.moe.",
        ),
        (
            {
                "tasks/moe/a.py": "import tasks.corpus.a",
                "tasks/corpus/a.py": "",
                "tasks/corpus/b.py": "import tasks.moe.a",
            },
            "circles: 1\n    tasks.",
        ),
        (
            {"tasks/corpus/a.py": "def f():\n    from tasks.pretrain.b import c", "tasks/pretrain/b.py": ""},
            "upward imports: 1\n    tasks.corpus.a imports tasks.pretrain.b",
        ),
        (
            {
                "tasks/scratch.py": "if TYPE_CHECKING:\n    from tasks import settings",
                "tasks/settings/__init__.py": "import bench.x",
                "bench/x.py": "",
            },
            "upward imports: 1\n    tasks.settings imports bench.x",
        ),
        (
            {"tasks/moe/a.py": "import tasks.plugins.x.hooks", "tasks/plugins/x/hooks.py": ""},
            "upward imports: 1\n    tasks.moe.a imports tasks.plugins.x.hooks",
        ),
        (
            {"flows/a.py": "import tasks.plugins.x.hooks", "tasks/plugins/x/hooks.py": ""},
            "upward imports: 1\n    flows.a imports tasks.plugins.x.hooks",
        ),
        ({"tasks/moe/a.py": "from prefect import flow"}, "upward imports: 1\n    tasks.moe.a imports prefect"),
    ],
)  # fmt: skip
def test_a_fault_is_named(
    files: dict[str, str],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    assert import_graph.main([]) == 1
    assert printed in capsys.readouterr().out


def test_large_files_and_crowded_packages_are_named_and_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {f"tasks/moe/m{i}.py": "" for i in range(import_graph.MOST_IMPORTED + 1)}
    imports = "".join(f"import tasks.moe.m{i}\n" for i in range(import_graph.MOST_IMPORTED + 1))
    write(tmp_path, {**modules, "tasks/pretrain/a.py": imports + "x = 1\n" * import_graph.MOST_LINES})
    monkeypatch.chdir(tmp_path)
    assert import_graph.main([]) == 0
    printed = capsys.readouterr().out
    assert "packages of which others import more than 15 modules: 1\n    tasks.moe (16)" in printed
    size = import_graph.MOST_IMPORTED + 1 + import_graph.MOST_LINES
    assert f"files over 300 lines: 1\n    tasks/pretrain/a.py ({size})" in printed


def test_hints_count_as_imports(tmp_path: Path) -> None:
    write(tmp_path, {"tasks/a.py": "if TYPE_CHECKING:\n    from tasks.b import c", "tasks/b.py": ""})
    assert import_graph.imports(Project({"tasks": tmp_path / "tasks"}))["tasks.a"] == {"tasks.b"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(folder).parents:
            (folder / package / "__init__.py").touch()
        path.write_text(text)

"""The import graph of this project is in order, and each fault of one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import house
from tasks.code import Project

ROOT = Path(__file__).parent.parent.parent


def test_this_house_has_no_circle_and_no_upward_arrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert house.main([]) == 0
    printed = capsys.readouterr().out
    assert "circles: none\nupward arrows: none\n" in printed
    assert "moe_kernels: " in printed
    assert "doors; imports nothing" in printed


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
            "upward arrows: 1\n    tasks.corpus.a imports tasks.pretrain.b",
        ),
        (
            {
                "tasks/scratch.py": "if TYPE_CHECKING:\n    from tasks import settings",
                "tasks/settings/__init__.py": "import bench.x",
                "bench/x.py": "",
            },
            "upward arrows: 1\n    tasks.settings imports bench.x",
        ),
        ({"tasks/moe/a.py": "from prefect import flow"}, "upward arrows: 1\n    tasks.moe.a imports prefect"),
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
    assert house.main([]) == 1
    assert printed in capsys.readouterr().out


def test_large_files_and_crowded_rooms_are_named_and_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doors = {f"tasks/moe/m{i}.py": "" for i in range(house.MOST_DOORS + 1)}
    imports = "".join(f"import tasks.moe.m{i}\n" for i in range(house.MOST_DOORS + 1))
    write(tmp_path, {**doors, "tasks/pretrain/a.py": imports + "x = 1\n" * house.MOST_LINES})
    monkeypatch.chdir(tmp_path)
    assert house.main([]) == 0
    printed = capsys.readouterr().out
    assert "rooms with more than 15 doors: 1\n    tasks.moe (16)" in printed
    assert f"files over 300 lines: 1\n    tasks/pretrain/a.py ({house.MOST_DOORS + 1 + house.MOST_LINES})" in printed


def test_hints_count_as_imports(tmp_path: Path) -> None:
    write(tmp_path, {"tasks/a.py": "if TYPE_CHECKING:\n    from tasks.b import c", "tasks/b.py": ""})
    assert house.imports(Project({"tasks": tmp_path / "tasks"}))["tasks.a"] == {"tasks.b"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(folder).parents:
            (folder / package / "__init__.py").touch()
        path.write_text(text)

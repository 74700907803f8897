"""The registry finds plug-ins by their folders, and settings take the fields and values that they add."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from tasks import plugin
from tasks.settings.fields import Frozen, choice, extended


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    found = {
        "a": SimpleNamespace(FIELDS={"pretrain": {"dial": (int, 3)}}, CHOICES={"mixture.method": ("dice",)}),
        "b": SimpleNamespace(),
    }
    monkeypatch.setattr(plugin, "modules", lambda seam: found)
    return found


def test_a_section_has_the_fields_of_plugins_and_a_subclass_keeps_its_name(two: object) -> None:
    class Core(Frozen):
        rate: float = 0.5

    section = extended("pretrain")(Core)
    assert section().model_dump() == {"rate": 0.5, "dial": 3}
    assert issubclass(section, Core)
    assert section.__name__ == "Core"
    with pytest.raises(ValidationError):
        section.model_validate({"dial": "much"})
    assert "dial" not in extended("evaluate")(Core).model_fields


def test_a_setting_with_fixed_values_takes_those_of_plugins(two: object) -> None:
    class Core(Frozen):
        method: choice("mixture.method", "uniform")  # type: ignore[valid-type]

    assert Core(method="dice").method == "dice"
    with pytest.raises(ValidationError, match="'uniform' or 'dice'"):
        Core(method="cards")


def test_two_plugins_with_one_field_are_refused(two: dict[str, SimpleNamespace]) -> None:
    two["b"].FIELDS = {"pretrain": {"dial": (int, 4)}}
    with pytest.raises(ValueError, match=r"plugins/b/settings\.py: another plug-in has pretrain\.dial"):
        plugin.fields("pretrain")


def test_a_plugin_cannot_replace_a_field_of_the_core(two: object) -> None:
    class Core(Frozen):
        dial: int = 1

    with pytest.raises(ValueError, match=r"pretrain\.dial is a field of the core"):
        extended("pretrain")(Core)


def test_every_file_of_a_plugin_fills_a_seam_or_is_imported_by_one_that_does() -> None:
    for name in plugin.names():
        files = {path.stem for path in (plugin.FOLDER / name).glob("*.py")} - {"__init__"}
        shared = any(f"tasks.plugins.{name} import" in path.read_text() for path in plugin.FOLDER.glob("*/hooks.py"))
        assert shared or files & plugin.SEAMS.keys(), f"tasks/plugins/{name} fills no seam"


def test_an_unknown_seam_is_an_error() -> None:
    with pytest.raises(KeyError, match="no seam"):
        plugin.modules("nothing")


def test_plugins_are_the_folders_below_tasks_plugins() -> None:
    assert set(plugin.names()) == {path.parent.name for path in Path("tasks/plugins").glob("*/__init__.py")}

"""Settings are read where nothing has run: a check takes a finished model's own config.json where there is one."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

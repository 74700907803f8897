"""The fixtures of training, and a tiny corpus of two domains to train on and one never trained on, made once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import SETTINGS
from tests.corpus import texts
from tests.pretrain.conftest import finished, prepared, process_group, project

__all__ = ["finished", "prepared", "process_group", "project"]


@pytest.fixture(scope="session")
def proxy_project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    """A project with model and corpus, whose domain `words` is unseen."""
    folder = tmp_path_factory.mktemp("proxies")
    texts.jsonl(folder / "words.jsonl", texts.sentences(60, seed=1))
    words = f'      words: {{source: "dir:{folder}/words.jsonl", format: jsonl, license: none, unseen: true}}\n'
    settings = SETTINGS.format(model=tiny_model, data=tiny_data).replace("\npipelines:", f"{words}\npipelines:")
    (folder / "pipelines.yaml").write_text(settings)
    (folder / "data/models").mkdir(parents=True)
    (folder / "data/models/tiny").symlink_to(tiny_model)
    before = Path.cwd()
    os.chdir(folder)
    try:
        texts.run()
    finally:
        os.chdir(before)
    assert json.loads((folder / "data/corpora/tiny/manifest.json").read_text())["domains"]["words"]["unseen"]
    return folder


@pytest.fixture
def proxy_folder(proxy_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with links to model and corpus; the test runs inside it."""
    for name in ("data", "pipelines.yaml"):
        (tmp_path / name).symlink_to(proxy_project / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path

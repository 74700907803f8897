"""Speed of the models of a run in the real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import speed


def test_a_finished_run_is_measured_beside_its_parent_and_its_child_on_the_text_that_it_was_judged_by(
    tiny_project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--engines", "llama.cpp", "--threads", "1", "--repeats", "1", "--new", "2"]
    assert speed.main(["tiny", *options]) == 1
    assert "runs/tiny/heldout.json does not exist; `moeforge run tiny` writes it" in capsys.readouterr().err
    for folder in ("data/models/tiny", "runs/tiny/trained", "runs/tiny/control/model"):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        Path(folder).symlink_to(tiny_model)
    Path("runs/tiny/heldout.json").write_text(json.dumps({"prose": [list(range(1, 65))]}))
    assert speed.main(["tiny", *options]) == 0
    printed = capsys.readouterr().out
    assert "prompt of 64, tokens/s" in printed
    for model in ("dense", "child", "trained"):
        assert f"| llama.cpp, Q8_0, 1 | {model} | " in printed

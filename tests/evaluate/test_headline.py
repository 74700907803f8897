"""README begins with the table of the demo's evaluation, which docs/results/demo.json holds."""

from __future__ import annotations

import json

import pytest

from tasks.evaluate import headline
from tests.conftest import ROOT

EVALUATION = json.loads((ROOT / "docs/results/demo.json").read_text())


def test_readme_has_the_table_of_the_demos_evaluation() -> None:
    readme = (ROOT / "README.md").read_text()
    assert headline.placed(readme, EVALUATION) == readme


def test_the_table_has_five_rows_by_model_and_the_parents_speed_is_one() -> None:
    lines = headline.table(EVALUATION).splitlines()
    assert lines[0] == "| | dense parent | MoE | pruned baseline |"
    assert [line.split(" | ")[0].lstrip("| ").split(",")[0] for line in lines[2:]] == [
        "perplexity", "active parameters", "all parameters", "decode speed", "memory"
    ]  # fmt: skip
    assert " | 1.00 × | " in lines[5]
    assert f"{EVALUATION['trained']['perplexity']['mean']:.2f}" in lines[2]


def test_rows_of_speed_are_left_out_where_none_was_measured() -> None:
    assert len(headline.table(EVALUATION | {"speed": {}}).splitlines()) == 5


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="table: demo"):
        headline.placed("# Title\n", EVALUATION)

"""When a retrained model is accepted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import judgement

BITS = st.floats(0.1, 10)


@given(BITS, BITS, st.floats(0, 1))
def test_a_model_is_refused_exactly_if_it_is_worse_by_more_than_the_tolerance(
    new: float, old: float, tolerance: float
) -> None:
    assert (judgement.refusal(new, old, tolerance=tolerance) is None) == (new <= old + tolerance)


def test_a_refusal_tells_the_numbers() -> None:
    assert judgement.refusal(1.25, 1.2, tolerance=0.01) == (
        "refused: 1.2500 bits per byte is 0.0500 worse than the accepted 1.2000; allowed: 0.0100 worse"
    )


def test_the_first_model_is_accepted() -> None:
    assert judgement.refusal(9.0, None, tolerance=0.0) is None


@pytest.mark.parametrize("new", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused_even_as_the_first(new: float) -> None:
    assert judgement.refusal(new, None, tolerance=1.0)


def test_accepting_records_figures_lock_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("stages: {}\n")
    assert judgement.accepted("demo") is None
    judgement.accept("demo", {"trained": 1.2, "dense": 1.1})
    record = json.loads(Path("runs/demo/accepted.json").read_text())
    assert record["trained"] == 1.2
    assert record["dvc_lock_sha256"] == hashlib.sha256(b"stages: {}\n").hexdigest()
    assert record["date"].endswith("+00:00")
    assert judgement.accepted("demo") == record

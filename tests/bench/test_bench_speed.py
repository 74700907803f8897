"""Speed of tiny models in the real engines, and the shapes of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import random_models, speed

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def test_random_splits_are_measured_beside_their_parent_and_a_dense_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(random_models.SIZES, "tiny", TINY)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shape = ["--share", "50", "--width", "32", "16", "--shared", "1", "0", "--engines", "llama.cpp"]
    options = ["--threads", "1", "--repeats", "2", "--new", "2", "--json", str(tmp_path / "out.json")]
    assert speed.main(["--random", "tiny", *shape, *options]) == 0
    printed = capsys.readouterr().out
    for model in ("dense", "child", "32x1+1of3", "16x0+4of8"):
        assert f"| llama.cpp, Q8_0, 1 | {model} | " in printed
    (row,) = json.loads((tmp_path / "out.json").read_text())["engines"]
    assert row["models"]["dense"]["ratio"]["decode"] == {"median": 1, "min": 1, "max": 1}
    assert list(tmp_path.glob("tmp*")) == []  # where the models were


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


@pytest.mark.parametrize(("width", "shared", "top_k"), [(100, 1, None), (32, 1, 2), (32, 2, None), (16, 5, 3)])
def test_a_split_that_does_not_have_the_share_is_refused(width: int, shared: int, top_k: int | None) -> None:
    with pytest.raises(ValueError, match="asks for 64 active neurons"):
        random_models.Shape.of(ffn=128, share=50, width=width, shared=shared, top_k=top_k, routed=None)


def test_experts_that_overlap_may_be_more_than_a_split_has() -> None:
    shape = random_models.Shape.of(ffn=128, share=50, width=32, shared=1, top_k=None, routed=8)
    assert str(shape) == "32x1+1of8"

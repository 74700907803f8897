from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus import manifest
from tasks.corpus.sampling import packing, windows
from tasks.corpus.sampling.windows import Windows
from tests.conftest import SETTINGS
from tests.corpus.handmade import EOS, corpus, documents

ROOT = Path(__file__).parents[3]
SEQ_LEN = 64


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Domains `prose`, of three shards, and `code`; the current folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    prose, code = documents([70, 3, 500, 64, 1, 1, 129, 40] * 9, seed=1), documents([30] * 40 + [400], seed=2)
    parts = [prose[:20], prose[20:21], prose[21:]]
    return corpus(tmp_path / "data", {"prose": parts, "code": [code]}, validation={"code": [code[:15]]})


shards_of_lengths = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=4)


@given(lengths=shards_of_lengths, seq_len=st.integers(1, 60), kind=st.sampled_from(["concat", "best_fit"]))
@settings(deadline=None, max_examples=30)
def test_windows_hold_the_tokens_that_their_origins_name_each_at_most_once(
    lengths: list[list[int]], seq_len: int, kind: packing.Packing
) -> None:
    parts = [documents(some, seed=i) for i, some in enumerate(lengths)]
    whole = np.concatenate([ids for part in parts for ids in part])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        result = Windows(corpus(Path(folder, "data"), {"d": parts}), "d", "train", seq_len=seq_len, packing=kind)
        seen = {(part, row): np.zeros(n, dtype=int) for part, some in enumerate(lengths) for row, n in enumerate(some)}
        for i in range(len(result)):
            window, origins = result.window(i), result.origins(i)
            assert window.ids.tolist() == result[i].tolist()
            assert window.starts.dtype == np.int32
            assert window.starts.tolist() == np.cumsum([0, *(origin.tokens for origin in origins)])[:-1].tolist()
            assert window.tokens == sum(origin.tokens for origin in origins)
            assert window.ids[window.tokens :].tolist() == [EOS] * (seq_len - window.tokens)
            for start, origin in zip(window.starts, origins, strict=True):
                part, row = int(Path(origin.shard).stem.split("-")[1]), origin.row
                place = slice(origin.start, origin.start + origin.tokens)
                assert window.ids[start : start + origin.tokens].tolist() == parts[part][row][place].tolist()
                seen[part, row][place] += 1
            if kind == "concat":
                assert window.ids.tolist() == whole[i * seq_len : (i + 1) * seq_len].tolist()
                assert window.tokens == seq_len
    times = np.concatenate(list(seen.values()))
    served = len(whole) // seq_len * seq_len if kind == "concat" else len(whole)
    assert times.tolist() == [1] * served + [0] * (len(whole) - served)


def test_best_fit_windows_are_the_bins_of_all_the_documents_of_the_split(two: Path) -> None:
    lengths = np.array([70, 3, 500, 64, 1, 1, 129, 40] * 9, dtype=np.int32)
    bins = packing.pack(lengths, seq_len=SEQ_LEN)
    result = Windows(two, "prose", "train", seq_len=SEQ_LEN, packing="best_fit")
    assert len(result) == len(bins)
    assert sum(result.window(i).tokens for i in range(len(result))) == lengths.sum()
    assert [len(result.origins(i)) for i in range(len(result))] == np.diff(bins.offsets).tolist()


def test_bins_are_kept_by_corpus_domain_split_and_length(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Windows(two, "prose", "train", seq_len=SEQ_LEN, packing="best_fit")
    folder = Path(".scratch/packing") / manifest.load(two).sha256
    assert [path.name for path in folder.iterdir()] == ["prose-train-64.arrow"]
    monkeypatch.setattr(packing, "pack", None)
    again = Windows(two, "prose", "train", seq_len=SEQ_LEN, packing="best_fit")
    assert again.window(0).tokens == SEQ_LEN
    with pytest.raises(TypeError):
        Windows(two, "code", "train", seq_len=SEQ_LEN, packing="best_fit")


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_a_window_outside_or_a_domain_unknown_is_an_error(two: Path, kind: packing.Packing) -> None:
    result = Windows(two, "prose", "train", seq_len=SEQ_LEN, packing=kind)
    for i in (-1, len(result)):
        for read in (result.__getitem__, result.window, result.origins):
            with pytest.raises(IndexError, match=f"has {len(result)} windows of 64 tokens; there is no {i}"):
                read(i)
    with pytest.raises(ValueError, match="no domain 'poems'; it has code, prose"):
        Windows(two, "poems", "train", seq_len=SEQ_LEN)


def test_a_shard_of_another_size_than_the_manifest_says_is_an_error(two: Path) -> None:
    one, other = (two / f"prose/train/part-0000{i}-000.arrow" for i in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"part-00000-000.arrow: has \d+ tokens, its manifest \d+; make the corpus"):
        Windows(two, "prose", "train", seq_len=SEQ_LEN)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_windows_of_a_held_out_split_are_spread_over_it_and_fewer_where_it_is_short(two: Path, split: str) -> None:
    of = {"validation": windows.validation, "test": windows.test}[split]
    result = of(two, seq_len=SEQ_LEN, count=5)
    code = documents([30] * 40 + [400], seed=2)
    whole = np.concatenate(code[:15] if split == "validation" else code)
    n = len(whole) // SEQ_LEN
    assert result["code"].shape == (5, SEQ_LEN)
    assert result["code"].dtype == np.int64
    for k, window in enumerate(result["code"]):
        i = k * n // 5
        assert window.tolist() == whole[i * SEQ_LEN : (i + 1) * SEQ_LEN].tolist()
    assert of(two, seq_len=SEQ_LEN, count=10**6)["code"].shape == (n, SEQ_LEN)
    with pytest.raises(
        ValueError, match=f"the {split} part of code, prose is shorter than one window of 99999 tokens; raise"
    ):
        of(two, seq_len=99999, count=1)


def test_a_test_split_without_a_window_is_found_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.mixture.__main__ import run

    monkeypatch.chdir(tmp_path)
    long, short = documents([100] * 3), documents([30])
    corpus(tmp_path / "data/corpora/tiny", {"code": [long, short], "prose": [long]})
    Path("pipelines.yaml").write_text(SETTINGS.format(model="none", data="none"))
    with pytest.raises(ValueError, match="the test part of code is shorter than one window of 64 tokens; raise"):
        run("tiny")


@pytest.mark.parametrize(
    ("split", "also"),
    [
        ("test", {"tasks/mixture/compare.py"}),
        # a domain that is never trained on may be what domain weights are chosen for (mixture.target)
        (
            "unseen",
            {
                "tasks/mixture/compare.py",
                "tasks/plugins/proxy_runs/units.py",
                "tasks/plugins/proxy_runs/estimating.py",
            },
        ),
    ],
)
def test_only_evaluations_and_comparisons_ask_for_windows_that_nothing_is_trained_on(
    split: str, also: set[str]
) -> None:
    asks = re.compile(rf"""\b\w+\.{split}\(|windows import .*\b{split}\b|Windows\([^)]*["']{split}["']""")
    folders = [ROOT / name for name in ("tasks", "flows", "kernels", "bench")]
    files = (path for folder in folders for path in folder.rglob("*.py"))
    result = {path.relative_to(ROOT).as_posix() for path in files if asks.search(path.read_text())}
    assert result == {"tasks/evaluate/__main__.py", "tasks/tools/evaluate/passages.py"} | also

"""Ids of every backend against the makers' own tokenizers, on little vocabularies of three layouts."""

from __future__ import annotations

import contextlib
import io
import json
import string
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tasks.corpus.tokenizer import backends, encoder, probe
from tests.corpus.texts import sentences
from tests.corpus.tokenizer import vocabularies

TRAINING = [*probe.SENTENCES * 3, *sentences(200, seed=5), string.printable]
SCRIPTS = [
    *probe.SENTENCES,
    *("", " ", "  a   b ", "\n\n x\t\ty\r\n", "1  2   345 67890", "it's I'LL"),
    *("a\u0301 👨\u200d👩\u200d👧 \xa0\u3000.", "<s> x </s>", "</s>", "a<|endoftext|>b"),
    *("<|begin_of_text|>1<|end_of_text|>", "<unk><0x0A>", "<|reserved_special_token_3|>"),
]
LAYOUTS = ("llama2", "llama3", "smollm2")


@pytest.fixture(autouse=True)
def short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte takes the reference a second or more."""
    monkeypatch.setattr(probe, "ONE_LINER", 1 << 14)


@pytest.fixture(scope="session")
def pieces() -> SentencePieceProcessor:
    """A SentencePiece model trained with LLaMA-2's options."""
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING),
        model_writer=trained,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=trained.getvalue())


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """tiktoken's ranks, learnt with Llama-3's pattern."""
    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(vocabularies.Regex(vocabularies.LLAMA3_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    _learn(learner, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: byte for byte, letter in backends._byte_letters().items()}
    return {bytes(letters[letter] for letter in token): i for token, i in learner.get_vocab().items()}


@pytest.fixture(scope="session")
def layouts(
    pieces: SentencePieceProcessor, ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Model directories by layout. SmolLM2's lacks bytes, as the real one does."""
    base = tmp_path_factory.mktemp("layouts")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _learn(learner, special_tokens=["<|endoftext|>", "<filename>"])
    smollm2 = vocabularies.smollm2(json.loads(learner.to_str()))
    return {
        "llama2": vocabularies.save(vocabularies.llama2(pieces), base / "llama2", eos="</s>", bos="<s>"),
        "llama3": vocabularies.save(
            vocabularies.llama3(ranks), base / "llama3", eos="<|end_of_text|>", bos="<|begin_of_text|>"
        ),
        "smollm2": vocabularies.save(smollm2, base / "smollm2", eos="<|endoftext|>", bos="<|endoftext|>"),
    }


def _learn(learner: Tokenizer, **options: Any) -> None:
    learner.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=700, show_progress=False, **options))


def _raw(model_dir: Path) -> dict[str, Any]:
    return json.loads((model_dir / "tokenizer.json").read_text())


def _fast(model_dir: Path) -> backends.Backend:
    pytest.importorskip("fastokens")
    return backends.Fastokens(_raw(model_dir), reference=backends.Reference(_raw(model_dir)))


def _lists(flat: tuple[Any, Any]) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(flat[0], flat[1][1:-1])]


def test_ids_of_a_llama_2_layout_are_those_of_sentencepiece(
    layouts: dict[str, Path], pieces: SentencePieceProcessor
) -> None:
    expected = pieces.encode(SCRIPTS)
    assert _lists(backends.Reference(_raw(layouts["llama2"])).encode(SCRIPTS)) == expected
    assert _lists(_fast(layouts["llama2"]).encode(SCRIPTS)) == expected


def test_ids_of_a_llama_3_layout_are_those_of_tiktoken(layouts: dict[str, Path], ranks: dict[bytes, int]) -> None:
    oracle = tiktoken.Encoding(
        "small", pat_str=vocabularies.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={"<|end_of_text|>": 9999}
    )
    expected = [oracle.encode_ordinary(text) for text in SCRIPTS]
    assert _lists(backends.Reference(_raw(layouts["llama3"])).encode(SCRIPTS)) == expected
    assert _lists(_fast(layouts["llama3"]).encode(SCRIPTS)) == expected


@pytest.fixture(scope="session")
def pairs(layouts: dict[str, Path]) -> list[tuple[backends.Backend, backends.Backend]]:
    """Every fast backend that is installed, with its reference."""
    result: list[tuple[backends.Backend, backends.Backend]] = []
    for folder in layouts.values():
        raw = _raw(folder)
        reference = backends.Reference(raw)
        for kind in backends.candidates(raw):
            with contextlib.suppress(ImportError):
                result.append((kind(raw, reference=reference), reference))
    return result


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(probe.ATOMS))).map("".join), max_size=8))
def test_a_fast_backend_gives_the_ids_of_the_reference_for_any_text(
    pairs: list[tuple[backends.Backend, backends.Backend]], texts: list[str]
) -> None:
    for fast, reference in pairs:
        assert _lists(fast.encode(texts)) == _lists(reference.encode(texts))


@pytest.mark.parametrize(
    ("layout", "name"), [("llama2", "fastokens"), ("llama3", "fastokens"), ("smollm2", "splintr")]
)
def test_the_fastest_backend_of_each_layout_passes_the_probe(layouts: dict[str, Path], layout: str, name: str) -> None:
    pytest.importorskip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = encoder.load_encoder(layouts[layout], backend="auto")
    slow = encoder.load_encoder(layouts[layout])
    assert fast.backend_name.startswith(name)
    assert slow.backend_name.startswith("tokenizers")
    assert fast.fingerprint == slow.fingerprint
    assert fast.checks["probed"] > 200
    assert fast.encode(SCRIPTS)[0].tolist() == slow.encode(SCRIPTS)[0].tolist()
    assert (fast.checks["sampled"], slow.checks) == (1, {"probed": 0, "sampled": 0})


def test_the_probe_holds_every_special_token_of_the_tokenizer(layouts: dict[str, Path]) -> None:
    probed = "".join(probe.texts(_raw(layouts["llama3"]))[:-1])
    assert all(token["content"] in probed for token in _raw(layouts["llama3"])["added_tokens"])


class Wrong:
    """A backend that is right but for one text."""

    name = "wrong 1.0"

    def __init__(self, raw: dict[str, Any], *, reference: backends.Reference, at: str = "７") -> None:
        self._reference, self._at = reference, at

    def encode(self, texts: Sequence[str]) -> backends.Flat:
        return self._reference.encode([text.replace(self._at, "!") for text in texts])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backend_that_differs_on_one_probe_is_not_taken_and_the_text_is_named(
    layouts: dict[str, Path], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ATOMS", (*probe.ATOMS, "７"))
    monkeypatch.setattr(backends, "candidates", lambda raw: [Wrong])
    with pytest.warns(RuntimeWarning, match=r"wrong 1.0 is not used, it differs on the text that starts '７': token"):
        opened = encoder.load_encoder(layouts[layout], backend="auto")
    assert opened.backend_name.startswith("tokenizers")
    assert opened.checks["probed"] == 0


def test_a_backend_that_refuses_the_tokenizer_is_named_and_one_that_is_not_installed_is_not(
    layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastokens")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words = vocabularies.save(tokenizer, tmp_path / "words", eos="</s>", bos="</s>")
    with pytest.warns(RuntimeWarning, match="fastokens refuses the tokenizer"):
        assert encoder.load_encoder(words, backend="auto").backend_name.startswith("tokenizers")
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.load_encoder(layouts["llama2"], backend="auto").backend_name.startswith("tokenizers")


@pytest.mark.parametrize("place", [0, 20, 40])
def test_a_backend_that_errs_on_a_sampled_document_stops_the_corpus(
    layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(encoder, "SAMPLE_EVERY", 20)
    monkeypatch.setattr(backends, "candidates", lambda raw: [Wrong])
    opened = encoder.load_encoder(layouts["llama3"], backend="auto")
    texts = sentences(60, seed=3)
    texts[place] = "Page ７ " + texts[place]
    message = (
        r"wrong 1.0 differs from tokenizers \S+ on the text that starts 'Page ７ 3-\d+: .*: token \d+ is \d+, not \d+"
    )
    batches = [texts[start : start + 7] for start in range(0, 60, 7)]  # they don't matter to the sample
    with pytest.raises(encoder.BackendMismatch, match=message):
        list(map(opened.encode, batches))
    assert opened.checks["sampled"] == place // 20


def test_a_document_too_long_to_compare_leaves_the_comparison_to_the_next(
    layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "SAMPLE_CHARACTERS", 1000)
    monkeypatch.setattr(backends, "candidates", lambda raw: [Wrong])
    opened = encoder.load_encoder(layouts["llama3"], backend="auto")
    opened.encode(["７ " * 1000])
    assert opened.checks["sampled"] == 0
    with pytest.raises(encoder.BackendMismatch):
        opened.encode(["７"])


def test_a_difference_names_the_first_token_that_differs_or_the_end() -> None:
    a = (np.array([1, 2, 3, 4, 5], np.uint32), np.array([0, 2, 5]))
    assert probe.difference(a, a, ["x", "y"]) is None
    longer = (np.array([1, 2, 3, 4, 5, 6], np.uint32), np.array([0, 2, 6]))
    assert probe.difference(a, longer, ["x", "y"]) == "the text that starts 'y': token 3 is the end, not 6"
    other = (np.array([1, 2, 3, 7, 5], np.uint32), np.array([0, 2, 5]))
    assert probe.difference(a, other, ["x", "y"]) == "the text that starts 'y': token 1 is 4, not 7"


def test_long_documents_go_to_the_backend_alone_and_short_ones_together(
    layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = encoder.load_encoder(layouts["llama2"])
    texts = ["ab" * n for n in (1, 2, 30, 1, 4, 4, 4, 0)]
    whole = opened.encode(texts)
    calls: list[list[str]] = []
    inner = opened.reference.encode

    def encode(batch: Sequence[str]) -> backends.Flat:
        calls.append(list(batch))
        return inner(batch)

    monkeypatch.setattr(encoder, "BATCH_CHARACTERS", 20)
    monkeypatch.setattr(opened.reference, "encode", encode)
    cut = opened.encode(texts)
    assert [[len(text) for text in call] for call in calls] == [[2, 4], [60], [2, 8, 8], [8, 0]]
    assert [part.tolist() for part in cut] == [part.tolist() for part in whole]

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from tasks.corpus.tokenizer import encoder
from tests.corpus.texts import sentences


def documents(ids: NDArray[Any], offsets: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(ids, offsets[1:-1])


SPECIAL_TEXT = ["<|endoftext|>", "a<|endoftext|>b", "</s>", "<s> x </s>", "<unk>", " <|endoftext|> "]


@pytest.mark.parametrize("model", ["byte_level", "sentencepiece"])
def test_special_tokens_inside_a_document_are_text(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    one = encoder.load_encoder(folder)
    added = Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()
    specials = {i for i, token in added.items() if token.special}
    assert specials
    for ids in documents(*one.encode(SPECIAL_TEXT)):
        assert ids[-1] == one.eos_token_id
        assert not specials & set(ids[:-1].tolist())


@pytest.fixture
def copy(byte_level: Path, tmp_path: Path) -> Path:
    """A copy of the byte-level model, to change."""
    return Path(shutil.copytree(byte_level, tmp_path / "copy"))


BARE = {"byte_level": "<|endoftext|>", "sentencepiece": "<s>"}


@pytest.fixture(params=list(BARE))
def with_bos(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Both tokenizers, with a BOS and a template that would add it."""
    model = Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "with-bos"))
    bos = BARE[request.param]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {bos}", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    names = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**names, "bos_token": {"content": bos}}))
    return model


@pytest.mark.parametrize("separators", ["eos", "bos", "bos_eos"])
def test_separators_are_those_of_the_settings_and_no_template_adds_any(with_bos: Path, separators: str) -> None:
    texts = ["", "a", "", *sentences(3, seed=4), "</s><|endoftext|>", ""]
    one = encoder.load_encoder(with_bos, separators=separators)
    raw = Tokenizer.from_file(str(with_bos / "tokenizer.json"))
    raw.encode_special_tokens = True
    before = [one.bos_token_id] if "bos" in separators else []
    after = [one.eos_token_id] if "eos" in separators else []
    expected = [[*before, *raw.encode(text, add_special_tokens=False).ids, *after] for text in texts]
    ids, offsets = one.encode(texts)
    assert [part.tolist() for part in documents(ids, offsets)] == expected
    assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (one.dtype, np.int64, 0, len(ids))
    assert [part.tolist() for part in one.encode([])] == [[], [0]]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=20), max_size=6), separators=st.sampled_from(["eos", "bos", "bos_eos"]))
def test_documents_that_are_ids_already_get_the_separators_they_lack(
    with_bos: Path, texts: list[str], separators: str
) -> None:
    one = encoder.load_encoder(with_bos, separators=separators)
    expected = [part.tolist() for part in one.encode(texts)]
    bare = [np.array(one.reference.encode([text])[0], dtype=np.int32) for text in texts]
    assert [part.tolist() for part in one.wrap(bare)] == expected
    assert [part.tolist() for part in one.wrap(documents(*one.encode(texts)) if texts else [])] == expected


def test_an_id_outside_the_vocabulary_is_refused(byte_level: Path) -> None:
    one = encoder.load_encoder(byte_level)
    for wrong in (400, -1):
        with pytest.raises(
            encoder.TokenizerError, match=rf"id {wrong} in a tokenised document is outside the vocabulary of 400"
        ):
            one.wrap([np.array([1, 2]), np.array([3, wrong, 5])])


def test_a_separator_without_a_token_is_an_error_that_says_what_mends_it(byte_level: Path, copy: Path) -> None:
    assert encoder.load_encoder(byte_level).bos_token_id is None
    for separators in ("bos", "bos_eos"):
        with pytest.raises(
            encoder.TokenizerError, match=r"tokenizer_config.json: bos_token is .*or set `separators: eos`"
        ):
            encoder.load_encoder(byte_level, separators=separators)
    (copy / "config.json").write_text(json.dumps({"vocab_size": 400, "bos_token_id": 7}))
    assert encoder.load_encoder(copy, separators="bos").bos_token_id == 7


def test_the_fingerprint_names_the_separators_and_no_backend(with_bos: Path) -> None:
    digests, ids, flags = zip(
        *(
            encoder.load_encoder(with_bos, separators=separators).fingerprint.replace("/bos", "+bos").split("/")
            for separators in ("eos", "bos", "bos_eos")
        ),
        strict=True,
    )
    one = encoder.load_encoder(with_bos)
    eos, bos = f"eos={one.eos_token_id}", f"bos={one.bos_token_id}"
    assert len(set(digests)) == 1
    assert ids == (eos, f"{eos}+{bos}", f"{eos}+{bos}")
    assert flags == ("specials-as-text,no-bos", "specials-as-text,no-eos", "specials-as-text")


def test_a_file_that_is_no_tokenizer_is_named(copy: Path) -> None:
    raw = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**raw, "model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(encoder.TokenizerError, match=r"tokenizer.json: not a tokenizer: "):
        encoder.load_encoder(copy)
    (copy / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(encoder.TokenizerError, match=r"tokenizer.json: not JSON .*fetch the file again"):
        encoder.load_encoder(copy)


def test_padding_truncation_and_dropout_saved_with_a_tokenizer_do_not_touch_documents(
    byte_level: Path, copy: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(copy / "tokenizer.json"))
    ours, theirs = encoder.load_encoder(byte_level), encoder.load_encoder(copy)
    texts = sentences(30, seed=2)
    assert theirs.encode(texts)[0].tolist() == ours.encode(texts)[0].tolist()
    assert theirs.fingerprint == ours.fingerprint


def test_the_fingerprint_follows_the_vocabulary_not_the_layout_of_its_file(byte_level: Path, copy: Path) -> None:
    raw = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(dict(reversed(raw.items())), indent=7))
    before = encoder.load_encoder(byte_level).fingerprint
    assert encoder.load_encoder(copy).fingerprint == before
    raw["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    assert encoder.load_encoder(copy).fingerprint != before


def test_other_separators_mean_the_same_ids_and_another_eos_does_not() -> None:
    assert encoder.same_ids("abc/eos=2/specials-as-text,no-bos", "abc/eos=2/bos=1/specials-as-text")
    assert not encoder.same_ids("abc/eos=2/specials-as-text,no-bos", "abc/eos=0/specials-as-text,no-bos")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(byte_level: Path, sentencepiece: Path, text: str) -> None:
    for model in (byte_level, sentencepiece):
        ids = encoder.load_encoder(model).encode([text])[0]
        assert encoder.token_bytes(model)[ids].sum() == len(text.encode())


def test_token_bytes_cover_the_vocabulary_of_the_model_with_specials_at_zero(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"vocab_size": 512}))  # rows padded, as models do
    sizes = encoder.token_bytes(copy)
    assert sizes.shape == (512,)
    assert sizes.dtype == np.int64
    assert sizes[0] == 0
    assert not sizes[400:].any()


def test_a_vocabulary_of_unknown_kind_has_no_bytes(copy: Path) -> None:
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["pre_tokenizer"], raw["decoder"] = {"type": "Whitespace"}, None
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"neither a byte-level nor a SentencePiece-like.*found Whitespace"):
        encoder.token_bytes(copy)


def test_the_type_of_ids_is_the_narrowest_that_holds_the_vocabulary(copy: Path) -> None:
    for vocab_size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        (copy / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
        assert encoder.load_encoder(copy).dtype is dtype


def test_eos_comes_from_the_tokenizer_or_else_the_model_and_its_absence_is_an_error(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert encoder.load_encoder(copy).eos_token_id == 0
    (copy / "tokenizer_config.json").unlink()
    (copy / "config.json").write_text(json.dumps({"vocab_size": 400, "eos_token_id": [7, 8]}))
    assert encoder.load_encoder(copy).eos_token_id == 7
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="name the token that ends a document"):
        encoder.load_encoder(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json: not found"):
        encoder.load_encoder(copy)

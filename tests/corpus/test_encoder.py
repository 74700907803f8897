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
from tokenizers import Tokenizer

from tasks.corpus import encoder

from .texts import sentences


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


def test_ids_are_those_of_the_reference_with_eos_after_each_document(byte_level: Path) -> None:
    texts = sentences(50, seed=1)
    reference = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    found = documents(*encoder.load_encoder(byte_level).encode(texts))
    assert [ids.tolist() for ids in found] == [[*reference.encode(text).ids, 0] for text in texts]


def test_padding_and_truncation_saved_with_a_tokenizer_do_not_touch_documents(
    byte_level: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(byte_level, tmp_path / "copy"))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(copy / "tokenizer.json"))
    ours, theirs = encoder.load_encoder(byte_level), encoder.load_encoder(copy)
    texts = sentences(3, seed=2)
    assert theirs.encode(texts)[0].tolist() == ours.encode(texts)[0].tolist()
    assert theirs.fingerprint == ours.fingerprint


def test_the_fingerprint_follows_the_vocabulary_not_the_layout_of_its_file(byte_level: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(byte_level, tmp_path / "copy"))
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


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(byte_level: Path, sentencepiece: Path, text: str) -> None:
    for model in (byte_level, sentencepiece):
        ids = encoder.load_encoder(model).encode([text])[0]
        assert encoder.token_bytes(model)[ids].sum() == len(text.encode())


def test_token_bytes_cover_the_vocabulary_of_the_model_with_specials_at_zero(byte_level: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(byte_level, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps({"vocab_size": 512}))  # rows padded, as models do
    sizes = encoder.token_bytes(copy)
    assert sizes.shape == (512,)
    assert sizes.dtype == np.int64
    assert sizes[0] == 0
    assert not sizes[400:].any()


def test_a_vocabulary_of_unknown_kind_has_no_bytes(byte_level: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(byte_level, tmp_path / "copy"))
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["pre_tokenizer"], raw["decoder"] = {"type": "Whitespace"}, None
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"neither a byte-level nor a SentencePiece-like.*found Whitespace"):
        encoder.token_bytes(copy)


def test_the_type_of_ids_is_the_narrowest_that_holds_the_vocabulary(byte_level: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(byte_level, tmp_path / "copy"))
    for vocab_size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        (copy / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
        assert encoder.load_encoder(copy).dtype is dtype


def test_eos_comes_from_the_tokenizer_or_else_the_model_and_its_absence_is_an_error(
    byte_level: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(byte_level, tmp_path / "copy"))
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

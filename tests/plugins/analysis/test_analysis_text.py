"""Windows from files, and the kinds of their tokens under tokenizers of both families."""

import json

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tasks.plugins.analysis import text
from tasks.plugins.analysis.text import KINDS

PROSE = "The committee met on 14 March, and the roof leaked. The committee commits 1869 times!\n\n\tüber alles"


def byte_level():
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([PROSE] * 3, vocab_size=320, min_frequency=2, special_tokens=["<end>"])
    return made._tokenizer


def metaspace():
    made = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([PROSE] * 3, BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<end>"]))
    return made


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_token_has_the_kind_of_its_text_whether_or_not_the_tokenizer_writes_the_space(make, tmp_path):
    made = make()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(tmp_path)
    encoded = made.encode(PROSE + "<end>")
    given = [KINDS[i] for i in text.kinds(tmp_path, np.array(encoded.ids))]
    assert given[0] in ("word start", "word continuation")  # a text's beginning
    said = list(zip(encoded.tokens, encoded.offsets, given, strict=True))[1:]
    for token, (start, end), kind in said:
        covered = PROSE[start:end]
        opened = token[0] in "Ġ▁"
        if token == "<end>":
            assert kind == "special"
        elif not covered.strip():
            assert kind == "whitespace"
        elif covered.strip().isdigit():
            assert kind == "digits"
        elif covered.strip() in (",", ".", "!"):
            assert kind == "punctuation"
        elif covered.strip().isalpha() and "ü" not in covered:
            assert kind == ("word start" if opened else "word continuation"), token
    assert {"word start", "word continuation", "digits", "special"} <= set(given)
    assert make is metaspace or "punctuation" in given, "which that one keeps with its word"


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (" the", "word start"), ("ing", "word continuation"), ("x1", "word continuation"), (" 14", "digits"),
        ("²", "digits"), (" ->", "punctuation"), ("—", "punctuation"), ("\n\n", "whitespace"), ("", "special"),
        ("\ufffd", "part of a character"),
    ],
)  # fmt: skip
def test_kinds_by_example(token, kind):
    assert text.kind(token) == kind


def test_tokens_are_counted_by_domain_and_without_a_tokenizer_have_no_kinds(tmp_path):
    windows = {"a": np.arange(8).reshape(2, 4), "b": np.arange(4).reshape(1, 4)}
    made = text.make(windows, tmp_path)
    assert made.summary() == {"tokens": 12, "seq_len": 4, "windows": {"a": 2, "b": 1}}
    assert made.domain_T.tolist() == [0] * 8 + [1] * 4
    assert list(made.groups()) == ["domain"]


def test_windows_are_read_from_json_and_from_plain_text(tmp_path):
    file = tmp_path / "heldout.json"
    file.write_text(json.dumps({"a": [[1, 2], [3, 4], [5, 6]], "b": [[7, 8]]}))
    read = text.read(file, tokenizer=tmp_path, count=2)
    assert {domain: ids.tolist() for domain, ids in read.items()} == {"a": [[1, 2], [3, 4]], "b": [[7, 8]]}
    notes = tmp_path / "notes.txt"
    notes.write_text(PROSE * 40)
    with pytest.raises(ValueError, match=r"no tokenizer\.json, which is to read .*notes\.txt; give token ids"):
        text.read(notes, tokenizer=tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<end>").save_pretrained(tmp_path)
    ids = text.read(notes, tokenizer=tmp_path)["notes"]
    assert ids.shape[1] == text.LENGTH
    assert byte_level().decode(ids[0].tolist()) == (PROSE * 40)[: len(byte_level().decode(ids[0].tolist()))]


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"a": [[1], [2, 3]]}', '{"a": [1, 2]}', '{"a": [[1]], "b": [[1, 2]]}', "x"]
)
def test_a_file_that_holds_no_windows_is_refused(content, tmp_path):
    file = tmp_path / "windows.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"windows\.json"):
        text.read(file, tokenizer=tmp_path)

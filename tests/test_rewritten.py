"""Parents that are read as another class: the same logits, or a refusal by name."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import architectures, rewritten, settings, sources
from tasks.moe import counts, dense
from tests import models

LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS = {
    "phi3": {},
    "phi3, heads": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "phi3, window": {"sliding_window": 8},
    "phi3, longrope": {"rope_parameters": LONG, "original_max_position_embeddings": 16},
    "olmo": {},
    "olmo, tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "olmo, biases": {"attention_bias": True},
}


@pytest.fixture
def source(tiny_model, tmp_path):
    def make(kind):
        folder = tmp_path / "source"
        model = models.build(kind, **{"pad_token_id": 0, "initializer_range": 0.3} | KINDS[kind])
        for name, weights in model.named_parameters():
            weights.data += 0.5 * name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight"))  # a mean
        model.save_pretrained(folder)
        for file in tiny_model.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder, model

    return make


def build(folder, tmp_path, **fields):
    work = tmp_path / "work"
    work.mkdir()
    return work / "model", dense.build(settings.Model(source=f"dir:{folder}", license="MIT", **fields), work)


def logits(model, length):
    with torch.no_grad():
        return model(input_ids=torch.arange(2 * length).view(2, length) * 7 % 64, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_that_is_read_as_another_class_keeps_its_logits(kind, source, tmp_path):
    folder, model = source(kind)
    target, metrics = build(folder, tmp_path)
    made = AutoModelForCausalLM.from_pretrained(target)
    row = architectures.REWRITTEN[kind.split(",")[0]]
    assert (made.config.model_type, type(made).__name__) == (row.becomes.model_type, row.becomes.architecture)
    for length in (12, 40):  # on both sides of the lengths at which windows and longrope change something
        expected, given = logits(model, length), logits(made, length)
        assert ((given - expected).abs().max() / expected.abs().max()).item() <= 1e-5
    assert metrics["parameters"]["total"] == sum(weights.numel() for weights in made.parameters())
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert getattr(made.config, field) == getattr(model.config, field)


@pytest.mark.parametrize("kind", ["phi3", "olmo"])
def test_a_plan_counts_a_local_parent_as_what_it_will_be_read_as(kind, source, tmp_path):
    folder, _ = source(kind)
    entry = settings.Model(source=f"dir:{folder}", license="MIT")
    fields, _ = settings.model.config("no such model", entry)
    _, metrics = build(folder, tmp_path)
    assert counts.parameters(fields) == metrics["parameters"]


def test_fields_that_a_config_leaves_out_have_the_defaults_of_its_own_class():
    for kind, row in architectures.REWRITTEN.items():
        bare = {"model_type": kind, "num_attention_heads": 8, "hidden_size": 64}
        own = AutoConfig.for_model(**bare)
        made = AutoConfig.for_model(**rewritten.config(bare))
        for name in ("vocab_size", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings",
                     "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "attention_dropout"):  # fmt: skip
            assert getattr(made, name) == getattr(own, name), (row, name)
        assert made.rope_parameters["rope_theta"] == own.rope_parameters["rope_theta"]
        assert getattr(made, "sliding_window", None) == getattr(own, "sliding_window", None)
        assert made.rms_norm_eps == getattr(own, "rms_norm_eps", 1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: every sparse class here turns whole"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1: no sparse class here drops residuals"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv = 8.0: no class that is written without norms on q and k clips them"),
    ],
)
def test_what_the_other_class_cannot_compute_is_refused_by_name(kind, changes, reason, source, tmp_path):
    folder, _ = source(kind)
    fields = json.loads((folder / "config.json").read_text())
    if kind == "phi3":
        fields["rope_parameters"].pop("partial_rotary_factor", None)
    (folder / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(sources.SourceError, match=f"model_type = '{kind}' is not supported with {reason}"):
        build(folder, tmp_path)

"""What a checkpoint folder says to transformers 4: read here by its formulas, and by the real one where there is one.

MOEFORGE_TRANSFORMERS_4 names a Python that has transformers 4 and torch; without it the last test is skipped.
"""

import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tasks.moe import files
from tests import models

CLASSES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": models.SLIDING,
    "qwen3": {"head_dim": 12},
    "granite": models.GRANITE,
    "mixtral": models.EXPERTS | {"sliding_window": 8, "head_dim": 12},
    "granitemoe": models.EXPERTS,
    "granitemoeshared": models.EXPERTS | {"shared_intermediate_size": 12},
    "qwen2_moe": models.QWEN | {"mlp_only_layers": [1], "shared_expert_intermediate_size": 12},
    "qwen3_moe": models.QWEN | {"head_dim": 12},
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.5, 4.0]}
ROPES = {
    "default": {"rope_theta": 100_000.0},
    "linear": {"rope_theta": 777.0, "factor": 2.5},
    "linear, by its old name": {"type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "dynamic": {"rope_theta": 500.0, "factor": 2.0},
    "yarn": {"rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16},
    "yarn, all of it": {
        "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.2,
        "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2, "truncate": False,
    },
    "yarn, without a factor": {"rope_theta": 500.0, "factor": None, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"rope_theta": 500.0, "factor": 9.0, "original_max_position_embeddings": 16} | FACTORS,
    "longrope, without a factor": {"rope_theta": 500.0, "original_max_position_embeddings": 32} | FACTORS,
    "longrope, without a length": {"rope_theta": 500.0, "factor": 3.0, "attention_factor": 1.4} | FACTORS,
}  # fmt: skip
EVERY = [(kind, rope) for kind in CLASSES for rope in ROPES]
CASES = [case for case in EVERY if case[0] == "qwen3_moe" or case[1] in ("default", "yarn, all of it", "longrope")]
LENGTH = 40


def config(kind, rope):
    head_dim = CLASSES[kind].get("head_dim", 8)
    parameters = {"rope_type": rope.split(",")[0]} | ROPES[rope]
    for name in FACTORS:
        if name in parameters:
            parameters[name] = list(np.interp(np.linspace(0, 3, head_dim // 2), range(4), parameters[name]))
    return models.config(kind, **CLASSES[kind] | {"rope_parameters": parameters})


def by_transformers_4(fields, length):
    """Inverse frequencies and the factor on cos and sin that transformers 4.57 makes of a config.json."""
    scaling, theta = fields.get("rope_scaling"), fields.get("rope_theta", 10_000.0)
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type"))
    dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    longest = fields["max_position_embeddings"]
    inverse = theta ** (-np.arange(0, dim, 2) / dim)
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "dynamic":
        factor = scaling["factor"]
        grown = theta * (factor * max(length, longest) / longest - (factor - 1)) ** (dim / (dim - 2))
        return grown ** (-np.arange(0, dim, 2) / dim), 1.0
    if kind == "longrope":
        factor, original = scaling.get("factor"), fields.get("original_max_position_embeddings")
        factor, original = (longest / original, original) if original else (factor, longest)
        attention = scaling.get("attention_factor") or math.sqrt(1 + math.log(factor) / math.log(original))
        return inverse / np.array(scaling["long_factor" if length > original else "short_factor"]), attention
    if kind == "llama3":
        wave, original = 2 * np.pi / inverse, scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = np.clip((original / wave - low) / (high - low), 0, 1)
        return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse, 1.0
    if kind == "yarn":
        factor, original = scaling["factor"], scaling.get("original_max_position_embeddings") or longest

        def corrected(turns):
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = corrected(scaling.get("beta_fast") or 32), corrected(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low + (0.001 if low == high else 0)), 0, 1)

        def size(mscale=1.0):
            return 0.1 * mscale * math.log(factor) + 1

        one, other = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = scaling.get("attention_factor") or (size(one) / size(other) if one and other else size())
        return inverse * (1 - ramp) + inverse / factor * ramp, attention
    return inverse, 1.0


@pytest.mark.parametrize(("kind", "rope"), CASES)
def test_transformers_4_reads_the_frequencies_of_transformers_5_in_every_class_and_rope_kind(kind, rope, tmp_path):
    given = config(kind, rope)
    files.write_config(given, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(given)
    rotary = type(model.model.rotary_emb)(config=given)
    cos, _ = rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    inverse, attention = by_transformers_4(fields, LENGTH)
    expected = np.cos(np.outer(np.arange(LENGTH), inverse)) * attention
    np.testing.assert_allclose(cos[0, :, : len(inverse)].numpy(), expected, atol=2e-5)
    read = AutoConfig.from_pretrained(tmp_path)
    again, _ = type(model.model.rotary_emb)(config=read)(torch.zeros(1), torch.arange(LENGTH)[None])
    assert torch.equal(again, cos)
    assert files.config_fields(read) == fields


@pytest.mark.parametrize("kind", CLASSES)
def test_dtype_and_the_number_of_experts_have_their_names_in_transformers_4(kind, tmp_path):
    given = config(kind, "default")
    given.dtype = "bfloat16"
    files.write_config(given, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"
    if "moe" in kind or kind == "mixtral":
        assert fields["num_experts" if kind.startswith("qwen") else "num_local_experts"] == 6


def tokenizer(folder):
    """Saved by transformers 5, with a special token of its own."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["to be or not to be"] * 9, vocab_size=280, special_tokens=["<|end|>", "<|user|>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", additional_special_tokens=["<|user|>"]
    )
    made.save_pretrained(folder)
    return made


def test_a_tokenizer_of_transformers_5_is_copied_with_names_that_transformers_4_knows(tmp_path):
    made = tokenizer(tmp_path / "a")
    assert json.loads((tmp_path / "a/tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    (tmp_path / "b").mkdir()
    files.copy_tokenizer(tmp_path / "a", tmp_path / "b")
    fields = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<|user|>"]
    assert not {"extra_special_tokens", "backend"} & fields.keys()
    text = "to be <|user|> or not"
    copied = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert copied(text).data == made(text).data
    assert copied.decode(copied(text)["input_ids"], skip_special_tokens=True) == "to be  or not"


_BY_4 = """
import sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
root = Path(sys.argv[1])
ids = torch.arange(80).view(2, 40) * 7 % 64
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, root / f"{folder.name}.4.pt")
print(AutoTokenizer.from_pretrained(sys.argv[2])("to be <|user|> or not")["input_ids"])
"""


@pytest.mark.e2e
@pytest.mark.skipif("MOEFORGE_TRANSFORMERS_4" not in os.environ, reason="needs a Python that has transformers 4")
def test_transformers_4_itself_gives_the_logits_and_the_ids(tmp_path):
    ids = torch.arange(80).view(2, LENGTH) * 7 % 64
    (tmp_path / "models").mkdir()
    expected = {}
    for number, (kind, rope) in enumerate(EVERY):
        torch.manual_seed(0)
        folder = tmp_path / "models" / f"{number:03}"
        AutoModelForCausalLM.from_config(config(kind, rope)).save_pretrained(folder)
        files.write_config(config(kind, rope), folder)
        with torch.no_grad():
            expected[number] = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
    made = tokenizer(tmp_path / "a")
    (tmp_path / "b").mkdir()
    files.copy_tokenizer(tmp_path / "a", tmp_path / "b")
    command = [os.environ["MOEFORGE_TRANSFORMERS_4"], "-c", _BY_4, str(tmp_path / "models"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(made("to be <|user|> or not")["input_ids"])
    for number, (kind, rope) in enumerate(EVERY):
        theirs = torch.load(tmp_path / f"models/{number:03}.4.pt")
        error = (theirs - expected[number]).abs().max() / expected[number].abs().max()
        assert error <= 1e-5, (kind, rope)

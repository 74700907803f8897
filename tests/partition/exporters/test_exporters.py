"""Every exporter against transformers itself: what save_pretrained writes, and the dense parent's logits."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tasks import settings
from tasks.moe import checkpoint
from tasks.moe.streamed import Streamed
from tasks.partition import exporters
from tasks.partition.convert import ffn, slices
from tests import models
from tests.partition import dense_models

BASE = {"num_hidden_layers": 3, "eos_token_id": [5, 6], "pad_token_id": 7}
ROPES = {
    "llama3": models.LLAMA3,
    "yarn": models.YARN,
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "dynamic": models.DYNAMIC,
}
PARENTS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, head_dim": {"head_dim": 12},
    "llama, biases": {"attention_bias": True},
    "llama, mha": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    **{f"llama, {name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
    "mistral": {"sliding_window": None},
    "mistral, wide window": {"sliding_window": 64},
    "mistral, window": {"sliding_window": 8, "head_dim": 12},
    "qwen2": {},
    "qwen2, tied, yarn": {"tie_word_embeddings": True, "rope_parameters": ROPES["yarn"]},
    "qwen2, sliding": models.SLIDING,
    "granite": models.GRANITE,
    "granite, biases, tied": models.GRANITE | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "qwen3, biases, window": models.SLIDING | {"attention_bias": True, "max_window_layers": 0, "head_dim": 8},
    "qwen3, sliding": models.SLIDING,
}
LLAMA_LIKE = [
    "llama",
    "llama, tied",
    "llama, head_dim",
    "llama, mha",
    *(name for name in PARENTS if "mistral" in name),
]
FULL = [name for name in PARENTS if not name.startswith("qwen3") and not name.endswith(("sliding", ", window"))]
EXPRESSED = {
    "mixtral": ["llama, tied", "llama, head_dim", "llama, mha", *(name for name in PARENTS if "mistral" in name)],
    "granitemoe": ["llama", "llama, biases", "qwen2", "granite"],
    "granitemoeshared": FULL,
    "qwen2_moe": ["llama", "llama, tied", "llama, head_dim", "mistral, window", "qwen2", "qwen2, sliding"],
    "qwen3_moe": ["qwen3", "qwen3, biases, window"],
}
CASES = [(parent, target) for target, parents in EXPRESSED.items() for parent in parents]


def dense_config(kind, **changes):
    return models.config(kind, **BASE | PARENTS[kind] | changes)


def partition(target="auto", **changes):
    shared = 2 if target == "granitemoeshared" else 0
    method = "activation" if shared else "random"
    fields = {"method": method, "experts": 6 - shared, "shared_experts": shared, "top_k": 6 - shared, "target": target}
    return settings.Partition(**fields | changes)


def save_dense(kind, folder, **fields):
    return dense_models.stored(folder, models.build(kind, **BASE | PARENTS[kind] | fields), max_shard_size="20KB")


def export(parent, folder, options):
    """Cut the neurons as they stand; with a zero router and all experts chosen the sum is the dense FFN."""
    experts = torch.arange(48).view(options.experts + options.shared_experts, -1).flip(0).numpy()

    def layer(i):
        return slices(*ffn(parent, i), experts, shared=options.shared_experts, scale=options.experts)

    return dense_models.export(parent, folder, options, layer=layer)


def logits(model):
    ids = torch.arange(120).view(3, 40) * 7 % 64
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def stored(folder):
    return {name: (entry.dtype, entry.shape) for name, entry in Streamed(folder).stored.items()}


def assert_same_logits(folder, dense):
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(notes.values())
    loaded.set_experts_implementation("eager")
    expected, ours = logits(dense), logits(loaded.eval())
    assert ((ours - expected).abs().max() / expected.abs().max()).item() <= 1e-5
    return loaded


@pytest.mark.parametrize(("parent", "target"), CASES)
def test_the_result_has_the_parents_logits_and_the_names_that_save_pretrained_writes(parent, target, tmp_path):
    source = save_dense(parent, tmp_path / "dense")
    export(source, tmp_path / "moe", partition(target))
    loaded = assert_same_logits(tmp_path / "moe", checkpoint.load(tmp_path / "dense"))
    assert loaded.config.model_type == target
    loaded.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "moe")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("moe", "again"))
    assert before | after == before
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(loaded.config, field) == getattr(source.config, field)


@pytest.mark.parametrize(
    ("parent", "options", "target"),
    [
        ("llama", {"layers": "alternate"}, "qwen2_moe"),
        ("llama", {"layers": [0]}, "qwen2_moe"),
        ("qwen2, sliding", {"layers": [2, 1]}, "qwen2_moe"),
        ("mistral, window", {"layers": "alternate", "shared_experts": 2}, "qwen2_moe"),
        ("qwen2", {"shared_experts": 2, "target": "qwen2_moe"}, "qwen2_moe"),
        ("llama, head_dim", {"shared_experts": 1, "experts": 5, "target": "qwen2_moe"}, "qwen2_moe"),
        ("qwen3", {"layers": "alternate"}, "qwen3_moe"),
    ],
)
def test_dense_layers_and_gated_shared_experts_keep_the_parents_logits(parent, options, target, tmp_path):
    source = save_dense(parent, tmp_path / "dense")
    shared = options.get("shared_experts", 0)
    sizes = {"experts": 6 - shared, "top_k": 6 - shared, "method": "activation" if shared else "random"}
    exporter = export(source, tmp_path / "moe", partition(**sizes | options))
    assert exporter.name == target
    loaded = assert_same_logits(tmp_path / "moe", checkpoint.load(tmp_path / "dense"))
    loaded.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "moe")


def test_an_idle_shared_expert_adds_exactly_nothing_and_loads_without_a_warning(tmp_path):
    export(save_dense("qwen2", tmp_path / "dense"), tmp_path / "moe", partition("qwen2_moe"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    hidden = torch.randn(5, 32)
    for layer in loaded.model.layers:
        assert torch.equal(layer.mlp.shared_expert(hidden), torch.zeros(5, 32))


@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared", "qwen2_moe"])
def test_every_tensor_keeps_its_parents_dtype(target, tmp_path):
    source = save_dense("llama", tmp_path / "dense", dtype=torch.bfloat16)
    export(source, tmp_path / "moe", partition(target))
    assert {dtype for dtype, _ in stored(tmp_path / "moe").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == torch.bfloat16
    dense, sparse = (Streamed(tmp_path / name) for name in ("dense", "moe"))
    for name in set(dense.stored) & set(sparse.stored):
        assert torch.equal(dense.tensor(name), sparse.tensor(name))


def test_qwen3_moes_config_has_the_published_name_for_the_number_of_experts(tmp_path):
    export(save_dense("qwen3", tmp_path / "dense"), tmp_path / "moe", partition())
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["num_experts"], config["head_dim"], config["norm_topk_prob"]) == (6, 12, True)


@pytest.mark.parametrize(
    ("parent", "options", "target"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"shared_experts": 2, "experts": 4}, "granitemoeshared"),
        ("llama, biases", {}, "granitemoe"),
        ("llama", {"layers": "alternate"}, "qwen2_moe"),
        ("mistral, window", {}, "mixtral"),
        ("mistral, window", {"shared_experts": 2, "experts": 4}, "qwen2_moe"),
        ("mistral, wide window", {"shared_experts": 2, "experts": 4}, "granitemoeshared"),
        ("qwen2", {}, "qwen2_moe"),  # vLLM drops GraniteMoe's biases
        ("qwen2", {"engines": ["llama.cpp", "transformers"]}, "granitemoe"),
        ("qwen2", {"engines": []}, "granitemoe"),
        ("qwen2", {"engines": ["transformers4"], "layers": "alternate"}, "qwen2_moe"),
        ("llama, tied", {"engines": ["sglang"]}, "granitemoe"),  # it leaves the head of the others uninitialised
        ("qwen2", {"layers": "alternate"}, "qwen2_moe"),
        ("qwen2, sliding", {}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
    ],
)
def test_auto_takes_the_first_class_that_can_express_parent_and_partition(parent, options, target):
    method = {"method": "activation"} if "shared_experts" in options else {}
    options = partition(**{"top_k": 2} | method | options)
    exporter = exporters.choose(dense_config(parent), options)
    assert exporter.name == target
    assert exporter.config(dense_config(parent), options).model_type == target


@pytest.mark.parametrize(
    ("parent", "changes", "target", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "mixtral", r"hidden_act = 'gelu'; experts are SwiGLU"),
        ("llama", {"mlp_bias": True}, "qwen2_moe", "mlp_bias = true"),
        ("llama", {"is_causal": False}, "granitemoe", "is_causal = false"),
        ("llama, biases", {}, "mixtral", r"a llama has biases \(q, k, v, o\); this class's: none"),
        ("llama, biases", {}, "qwen2_moe", r"this class's: none and q, k, v"),
        ("qwen2", {}, "mixtral", r"a qwen2 has biases \(q, k, v\)"),
        ("qwen3", {}, "mixtral", "norms on queries and keys"),
        ("qwen3", {}, "qwen2_moe", "norms on queries and keys"),
        ("llama", {}, "qwen3_moe", "norms on queries and keys"),
        ("granite", {}, "mixtral", r"a granite has multipliers \(embedding_multiplier, .*\); this class has none"),
        ("granite", {"attention_multiplier": 1.0}, "qwen2_moe", "a granite has multipliers"),
        ("mistral, window", {}, "granitemoe", "sliding_window = 8; this class attends to the whole text"),
        ("qwen2, sliding", {}, "granitemoe", "sliding_window = 8"),
        ("qwen3, sliding", {}, "qwen3_moe", "sliding and full attention alternate"),
        ("llama", {"partition": {"shared_experts": 2, "experts": 4}}, "mixtral", "shared_experts = 2; this class has"),
        ("llama", {"partition": {"shared_experts": 2, "experts": 4}}, "granitemoe", "this class has none"),
        ("qwen3", {"partition": {"shared_experts": 2, "experts": 4}}, "qwen3_moe", "this class has none"),
        ("llama", {"partition": {"shared_experts": 0}}, "granitemoeshared", "the one with shared experts"),
        ("llama", {"partition": {"layers": "alternate"}}, "mixtral", "layers = 'alternate'; this class has no dense"),
    ],
)
def test_what_a_class_cannot_express_is_refused_with_the_reason(parent, changes, target, reason):
    options = {"top_k": 2, "method": "activation", "experts": 6, "shared_experts": 0}
    options = partition(target, **options | changes.pop("partition", {}))
    dense = dense_config(parent, **changes)
    assert re.search(reason, exporters.EXPORTERS[target].supports(dense, options))
    with pytest.raises(ValueError, match=rf"partition.target = '{target}' .*(\n.*)*{target}: .*{reason}") as raised:
        exporters.choose(dense, options)
    assert all(f"\n  {name}: " in str(raised.value) for name in exporters.EXPORTERS)
    with pytest.raises(ValueError, match=reason):
        exporters.EXPORTERS[target].config(dense, options)


def test_a_field_of_the_parents_class_that_no_exporter_knows_is_refused(monkeypatch):
    monkeypatch.setattr("tasks.partition.exporters.base._HANDLED", exporters.base._HANDLED[:-1])
    dense = dense_config("llama", pretraining_tp=2)
    for exporter in exporters.EXPORTERS.values():
        assert "config.json: pretraining_tp = 2 has no place" in exporter.supports(dense, partition())


def test_families_without_a_dense_ffn_and_partitions_without_a_layer_are_refused():
    with pytest.raises(ValueError, match=r"model_type = 'mixtral' is no dense family known here: llama, mistral"):
        exporters.choose(models.config("mixtral"), partition())
    with pytest.raises(ValueError, match=r"partition.layers = 'alternate' leaves no layer"):
        exporters.choose(dense_config("llama", num_hidden_layers=1), partition(layers="alternate"))
    with pytest.raises(ValueError, match="does not divide the FFN width 48"):
        exporters.choose(dense_config("llama"), partition(experts=7, top_k=2))


def test_classes_of_transformers_have_a_selection_bias_and_none_of_those_that_are_written():
    models = Path(transformers.__file__).parent / "models"
    having = {
        file.parent.name for file in models.glob("*/modeling_*.py") if "e_score_correction_bias" in file.read_text()
    }
    assert len(having) > 25
    assert {"deepseek_v3", "dots1", "glm4_moe"} <= having
    assert not having & set(exporters.EXPORTERS)

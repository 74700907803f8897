"""A checkpoint of the partition stage is held against its index and its parent, and whatever was altered is named."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_identity import METHODS, converted, edit

from tasks import settings
from tasks.moe.streamed import Streamed
from tasks.partition import index
from tasks.tools.verify_partition import verify_checkpoint

CHOICES = {
    "random": METHODS["random"] | {"experts": 8},
    "shared": METHODS["importance, inter"],
    "shared, qwen2_moe, alternate": METHODS["importance, inter"] | {"target": "qwen2_moe", "layers": "alternate"},
    "idle shared expert": METHODS["random"] | {"experts": 8, "target": "qwen2_moe"},
    "granitemoe": METHODS["random"] | {"experts": 8, "scale": "variance", "target": "granitemoe"},
    "dropped neurons": METHODS["moebert"],
    "refitted": METHODS["importance, inter"] | {"down_proj": "refit"},
    "copies": METHODS["copies"],
    "perturbed": METHODS["slices of copies"]
    | {"experts": 4, "top_k": 2, "expert_size": 64, "noise": 0.1, "reinitialise": 0.25},
}


def convert(dense_dir, folder, choice):
    _, made = converted(Streamed(dense_dir), folder / "moe", settings.Partition(**CHOICES[choice]))
    index.write(made, folder / "partition.safetensors")
    return folder


@pytest.fixture(scope="module")
def conversions(tmp_path_factory, tiny_model):
    """The folder with the tiny model converted by one of CHOICES, made once."""
    return functools.cache(lambda choice: convert(tiny_model, tmp_path_factory.mktemp("made"), choice))


@pytest.fixture
def write(tmp_path, tiny_model, conversions):
    """A copy of the conversion by one of CHOICES: the arguments of verify_checkpoint."""

    def copy(choice):
        folder = shutil.copytree(conversions(choice), tmp_path / "copy")
        return folder / "moe", folder / "partition.safetensors", tiny_model

    return copy


@pytest.mark.parametrize("choice", CHOICES)
def test_nothing_is_wrong_with_what_was_written(write, choice):
    assert verify_checkpoint(*write(choice)) == []


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [("granitemoe", torch.bfloat16), ("refitted", torch.float16), ("perturbed", torch.bfloat16)],
)
def test_nor_with_weights_of_16_bits(tmp_path, tiny_model, choice, dtype):
    dense_dir = shutil.copytree(tiny_model, tmp_path / "dense")
    tensors = load_file(dense_dir / "model.safetensors")
    save_file({name: w.to(dtype) for name, w in tensors.items()}, dense_dir / "model.safetensors")
    convert(dense_dir, tmp_path, choice)
    assert verify_checkpoint(tmp_path / "moe", tmp_path / "partition.safetensors", dense_dir) == []


def change_index(path, change):
    made = index.read(path)
    change(made)
    index.write(made, path)


def test_experts_whose_rows_are_not_the_parents_are_named(write):
    moe_dir, index_path, dense_dir = write("shared")

    def exchange(made):
        made.layers[1][[2, 3]] = made.layers[1][[3, 2]]  # routed experts 0 and 1: the sum is the same

    change_index(index_path, exchange)
    problems = verify_checkpoint(moe_dir, index_path, dense_dir)
    assert [problem.partition("layer 1: ")[2].partition(" are")[0] for problem in problems] == [
        f"{rows} of experts [0, 1]" for rows in ("gate rows", "up rows", "down columns")
    ]


def test_shared_experts_whose_rows_are_not_the_parents_are_named(write):
    moe_dir, index_path, dense_dir = write("shared")
    edit(moe_dir, **{"0_shared_mlp_input_linear_weight": lambda w: w[[*range(16, 32), *range(16), *range(32, 64)]]})
    rows, identity = verify_checkpoint(moe_dir, index_path, dense_dir)
    assert "layer 0: gate rows of shared experts [0, 1]" in rows
    assert "identity test" in identity


def test_a_refit_may_change_down_alone(write):
    moe_dir, index_path, dense_dir = write("refitted")
    edit(moe_dir, **{"1_shared_mlp_output_linear_weight": lambda w: w * 1.01})
    assert verify_checkpoint(moe_dir, index_path, dense_dir) == []
    edit(moe_dir, **{"1_block_sparse_moe_input_linear_weight": lambda w: w * 1.01})
    problems = verify_checkpoint(moe_dir, index_path, dense_dir)
    assert [problem.partition("layer 1: ")[2].partition(" of")[0] for problem in problems] == ["gate rows", "up rows"]


def test_a_fit_may_change_gate_and_up_too_and_nothing_else(write):
    moe_dir, index_path, dense_dir = write("refitted")
    change_index(index_path, lambda made: made.meta["settings"].update(fit_passes=1))
    edit(moe_dir, **{"1_block_sparse_moe_input_linear_weight": lambda w: w * 1.01})
    assert verify_checkpoint(moe_dir, index_path, dense_dir) == []
    edit(moe_dir, **{"1_self_attn_q_proj_weight": lambda w: w * 1.01})
    assert "not bit for bit the parent's" in verify_checkpoint(moe_dir, index_path, dense_dir)[0]


def test_a_failed_identity_test_is_told(write, tmp_path):
    moe_dir, index_path, dense_dir = write("random")
    other = shutil.copytree(dense_dir, tmp_path / "other")
    edit(other, layers_0_mlp_down_proj_weight=lambda w: w + 1)
    columns, identity = verify_checkpoint(moe_dir, index_path, other)
    assert "layer 0: down columns of experts [0, 1, 2, 3, 4]" in columns
    assert "identity test" in identity


def test_copies_perturbed_by_another_seed_are_told(write):
    moe_dir, index_path, dense_dir = write("perturbed")
    change_index(index_path, lambda made: made.meta["settings"].update(seed=7))
    problems = verify_checkpoint(moe_dir, index_path, dense_dir)
    assert len(problems) == 6  # gate, up and down of two layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.layers[0][:1].__imul__(0), "layer 0 has experts with a neuron twice: [0]"),
        (lambda made: made.scales.update({1: 2.5}), "down columns of experts [0, 1, 2, 3, 4]"),
        (lambda made: made.layers.pop(1) is made.scales.pop(1), "by its settings [0, 1] become sparse"),
        (lambda made: made.meta["settings"].update(top_k=3), "num_experts_per_tok = 2"),
        (lambda made: made.meta["settings"].update(experts=4), "in its settings 0 and 4"),
    ],
)
def test_an_index_that_does_not_fit_is_told(write, change, message):
    moe_dir, index_path, dense_dir = write("random")
    change_index(index_path, change)
    assert message in verify_checkpoint(moe_dir, index_path, dense_dir)[0]


@pytest.mark.parametrize(
    ("choice", "field", "value"),
    [
        ("random", "num_experts_per_tok", 1),
        ("shared", "residual_multiplier", 0.5),
        ("idle shared expert", "norm_topk_prob", False),
        ("random", "rms_norm_eps", 1e-3),
    ],
)
def test_a_field_of_the_config_that_the_partition_does_not_write_is_named(write, choice, field, value):
    moe_dir, index_path, dense_dir = write(choice)
    config = json.loads((moe_dir / "config.json").read_text())
    (moe_dir / "config.json").write_text(json.dumps(config | {field: value}))
    (problem,) = verify_checkpoint(moe_dir, index_path, dense_dir)
    assert problem.startswith(f"{moe_dir / 'config.json'}: {field} = {value}; ")


@pytest.mark.parametrize(
    ("choice", "end", "change", "message"),
    [
        ("random", "1_self_attn_k_proj_weight", lambda w: w.nextafter(w + 1), "k_proj.weight is not bit for bit"),
        ("random", "model_norm_weight", lambda w: w.double(), "model.norm.weight is not bit for bit"),
        (
            "shared, qwen2_moe, alternate",
            "0_mlp_up_proj_weight",
            lambda w: -(-w + 1e-9),
            "0.mlp.up_proj.weight is not",
        ),
        ("idle shared expert", "0_mlp_shared_expert_gate_weight", torch.ones_like, "shared expert is not zero"),
        ("idle shared expert", "1_mlp_shared_expert_up_proj_weight", torch.ones_like, "shared expert is not zero"),
        ("random", "1_block_sparse_moe_experts_3_w2_weight", lambda w: w * 1.00001, "down columns of experts [3]"),
        ("random", "1_block_sparse_moe_experts_3_w1_weight", lambda w: w.nextafter(w + 1), "gate rows of experts [3]"),
    ],
)
def test_an_altered_tensor_is_named(write, choice, end, change, message):
    moe_dir, index_path, dense_dir = write(choice)
    edit(moe_dir, **{end: change})
    assert message in verify_checkpoint(moe_dir, index_path, dense_dir)[0]


def test_a_tensor_of_no_known_origin_is_named(write):
    moe_dir, index_path, dense_dir = write("random")
    tensors = load_file(moe_dir / "model.safetensors")
    save_file(tensors | {"model.bias": torch.zeros(3)}, moe_dir / "model.safetensors")
    assert verify_checkpoint(moe_dir, index_path, dense_dir) == [f"{moe_dir}: model.bias: of no known origin"]


def test_files_that_are_cut_short_or_absent_are_named(write):
    moe_dir, index_path, dense_dir = write("random")
    weights = moe_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(weights)):
        verify_checkpoint(moe_dir, index_path, dense_dir)
    index_path.unlink()
    with pytest.raises(ValueError, match=str(index_path)):
        verify_checkpoint(moe_dir, index_path, dense_dir)

"""With all experts on, a converted checkpoint gives its parent's logits, whatever method, family, class and sizes."""

import functools
import itertools
import json

import pytest
import torch
from dense_models import export, sample, stored
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks import settings
from tasks.moe.streamed import Streamed
from tasks.partition import construct, convert, exporters, identity, index, methods, positions
from tasks.partition.fitting import Fitted
from tasks.partition.layer import Layer, Sizes
from tests import models

FAMILIES = {
    "llama": {},
    "llama, tied, llama3 rope": {"tie_word_embeddings": True, "rope_parameters": models.LLAMA3},
    "llama, biases, wide heads": {"attention_bias": True, "head_dim": 12},
    "mistral, window": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "granite": models.GRANITE,
}
METHODS = {
    "random": {"method": "random", "experts": 6, "top_k": 2},
    "clustering": {"method": "clustering", "experts": 4, "top_k": 2, "metric": "cosine"},
    "coactivation": {"method": "coactivation", "experts": 6, "top_k": 1, "scale": "paper"},
    "importance, independent": {"method": "importance", "experts": 6, "top_k": 3, "sharing": "none"},
    "importance, inner": {"method": "importance", "experts": 6, "top_k": 2, "sharing": "inner", "expert_size": 12},
    "importance, inter": {"method": "importance", "experts": 6, "shared_experts": 2, "top_k": 2, "sharing": "inter"},
    "moebert": {"method": "moebert", "experts": 4, "top_k": 1, "common_neurons": 4, "expert_size": 10},
    "copies": {"method": "copy", "experts": 3, "top_k": 1},
    "slices of copies": {"method": "copy", "experts": 6, "top_k": 3, "expert_size": 16, "scale": "variance"},
    "activation": {"method": "activation", "experts": 6, "shared_experts": 2, "top_k": 2, "scale": "mean"},
    "token clusters": {"method": "token_clusters", "experts": 3, "shared_experts": 2, "top_k": 1, "expert_size": 12},
}
WIDTH = 48


def parent(folder, kind, **fields):
    """A random dense checkpoint of 2 layers, hidden 32, vocabulary 64, whose FFNs matter."""
    return stored(folder, models.build(kind, **{"max_position_embeddings": 128} | fields))


def converted(dense, folder, options):
    """The sparse checkpoint and its index; a refit stands for itself by random changes of down_proj."""
    scale = {"unit": options.top_k, "paper": 1.5, "mean": 2.5, "variance": 3**0.5}[options.scale]
    sizes = Sizes.of(options, dense.config.intermediate_size)
    layers = {}

    def layer(i):
        layers[i], sparse = sparse_layer(dense, i, options, sizes=sizes, scale=scale)
        return sparse

    export(dense, folder, options, layer=layer)
    made = index.Index(
        layers=layers,
        scales=dict.fromkeys(layers, float(scale)),
        shared_experts=options.shared_experts,
        meta={"settings": options.model_dump()},
    )
    return Streamed(folder), made


def sparse_layer(dense, i, options, *, sizes, scale):
    generator = torch.Generator().manual_seed(i)
    gate, up, down = convert.ffn(dense, i)
    seen = Layer(
        number=i,
        gate_ND=gate.float(),
        up_ND=up.float(),
        down_DN=down.float(),
        x_TD=torch.randn(64, dense.config.hidden_size, generator=generator),
        importance_CN=torch.rand(sizes.experts, sizes.width, generator=generator),
    )
    experts = methods.get(options.method).split(seen, sizes, options)
    if options.down_proj == "refit":
        down = down.float()
        down += torch.randn(down.shape, generator=generator) * down.std()
    router_ED = gate.new_zeros(sizes.experts, gate.shape[1])
    fitted = Fitted(router_ED=router_ED, scale=scale, gate_ND=gate, up_ND=up, down_DN=down)
    return experts, construct._experts(dense, i, fitted, experts_EF=experts, scale=scale, partition=options)


@pytest.fixture(scope="module")
def dense_of(tmp_path_factory):
    """The parent of a family, made once."""
    return functools.cache(lambda family: parent(tmp_path_factory.mktemp("dense"), family, **FAMILIES[family]))


@pytest.mark.parametrize(("method", "family"), list(zip(METHODS, itertools.cycle(FAMILIES), strict=False)))
def test_every_method_and_every_family_gives_the_parents_logits(dense_of, tmp_path, method, family):
    dense = dense_of(family)
    chosen = METHODS[method]
    if family == "qwen3":  # no class has shared experts beside norms on queries and keys
        chosen = chosen | {"shared_experts": 0, "sharing": "none"}
    options = settings.Partition(**chosen)
    moe, made = converted(dense, tmp_path / "moe", options)
    assert made.problems(WIDTH) == []
    assert identity.prove(moe, dense, made, sample()).equal <= 1e-5


def expressible():
    """The first and the last family that a class can express with and without shared experts: (family, method, class).

    tests/partition/exporters holds the others against the parent's logits.
    """
    for method, target in itertools.product(("random", "importance, inter"), exporters.EXPORTERS):
        options = settings.Partition(**METHODS[method])
        families = [
            family
            for family in FAMILIES
            if exporters.EXPORTERS[target].supports(models.config(family, **FAMILIES[family]), options) is None
        ]
        for family in dict.fromkeys([*families[:1], *families[-1:]]):
            yield family, method, target


@pytest.mark.parametrize(("family", "method", "target"), list(expressible()))
def test_every_class_that_can_express_a_family_gives_its_logits(dense_of, tmp_path, family, method, target):
    dense = dense_of(family)
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS[method] | {"target": target}))
    assert moe.config.model_type == target
    assert identity.errors(moe, dense, made, sample()).equal <= 1e-5


@given(
    experts=st.sampled_from([3, 4, 6]),
    shared=st.sampled_from([0, 1, 2]),
    size=st.sampled_from([2, 5]),
    top_k=st.integers(1, 3),
    where=st.sampled_from([("auto", "all"), ("qwen2_moe", "all"), ("auto", "alternate"), ("auto", [2, 0])]),
    kv_heads=st.sampled_from([1, 2, 4]),
)
@hypothesis_settings(max_examples=6, deadline=None)
def test_all_sizes_and_any_choice_of_layers_give_the_parents_logits(
    tmp_path_factory, experts, shared, size, top_k, where, kv_heads
):
    folder = tmp_path_factory.mktemp("sizes")
    dense = parent(
        folder / "dense",
        "llama",
        intermediate_size=size * (experts + shared),
        num_key_value_heads=kv_heads,
        num_hidden_layers=3,
    )
    options = settings.Partition(
        method="importance",
        sharing="inter" if shared else "none",
        experts=experts,
        shared_experts=shared,
        top_k=top_k,
        target=where[0],
        layers=where[1],
    )
    moe, made = converted(dense, folder / "moe", options)
    assert sorted(made.layers) == options.sparse_layers(3)
    assert identity.errors(moe, dense, made, sample(seed=size)).equal <= 1e-5


def test_a_method_that_drops_neurons_is_held_against_the_parent_without_them(dense_of, tmp_path):
    dense = dense_of("llama")
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["moebert"]))
    assert made.dropped(WIDTH) == pytest.approx((48 - 4 - 4 * 6) / 48)
    assert identity.errors(moe, dense, made, sample()).equal <= 1e-5
    plain = AutoModelForCausalLM.from_pretrained(dense.folder)
    with torch.no_grad():
        for i, layer in enumerate(plain.model.layers):
            layer.mlp.down_proj.weight[:, made.times(i, width=WIDTH) == 0] = 0
    plain.save_pretrained(tmp_path / "pruned")
    assert identity.errors(moe, Streamed(tmp_path / "pruned"), made, sample()).equal <= 1e-5


def edit(folder, **changes):
    """Replace tensors of a checkpoint: the name's end, with _ for its dots, and a function of the old tensor."""
    tensors = load_file(folder / "model.safetensors")
    for end, change in changes.items():
        (name,) = [name for name in tensors if name.replace(".", "_").endswith(end)]
        tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("end", "change"),
    [
        ("1_block_sparse_moe_experts_2_w1_weight", lambda w: w[[1, 0, *range(2, len(w))]]),  # neurons swapped
        ("0_block_sparse_moe_experts_0_w2_weight", lambda w: w * 1.001),
        ("1_block_sparse_moe_experts_5_w3_weight", lambda w: w.fill_(float("nan"))),
        ("0_self_attn_q_proj_weight", lambda w: w * 1.001),
    ],
    ids=["neurons", "scale", "nan", "attention"],
)
@pytest.mark.parametrize("options", [{}, {"down_proj": "refit"}], ids=["moved", "refitted"])
def test_the_test_notices(dense_of, tmp_path, end, change, options):
    dense = dense_of("llama")
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["random"]))
    made.meta["settings"] |= options
    edit(moe.folder, **{end: change})
    if options and "experts" in end and "5" not in end:  # within what a refit may alter; verify holds gate and up
        assert identity.prove(Streamed(moe.folder), dense, made, sample()).equal <= 1e-5
        return
    with pytest.raises(identity.IdentityError, match=r"allowed for torch\.float32: 1e-05"):
        identity.prove(Streamed(moe.folder), dense, made, sample())


def test_a_wrong_scale_in_the_index_is_noticed(dense_of, tmp_path):
    dense = dense_of("llama")
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["random"]))
    made.scales[1] *= 1.001
    with pytest.raises(identity.IdentityError):
        identity.prove(moe, dense, made, sample())


def test_the_error_is_that_of_the_whole_models(dense_of, tmp_path):
    dense = dense_of("llama")
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["random"]))
    edit(moe.folder, **{"0_block_sparse_moe_experts_0_w2_weight": lambda w: w * 1.2})
    plain = AutoModelForCausalLM.from_pretrained(moe.folder, experts_implementation="eager")
    ids = torch.from_numpy(sample())
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.top_k = 6
            layer.mlp.experts.down_proj *= 6 / 2
        expected = AutoModelForCausalLM.from_pretrained(dense.folder)(input_ids=ids).logits
        wanted = (plain(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
    ours = identity.errors(Streamed(moe.folder), dense, made, sample()).equal
    assert ours == pytest.approx(wanted.item(), rel=1e-3)
    assert ours > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_that_is_no_power_of_two_rounds_weights_of_16_bits_within_their_tolerance(tmp_path, dtype):
    dense = parent(tmp_path / "dense", "llama", dtype=dtype, num_hidden_layers=6)
    errors = {}
    for scale in ("unit", "variance"):
        options = settings.Partition(method="random", experts=6, top_k=2, scale=scale)
        moe, made = converted(dense, tmp_path / scale, options)
        errors[scale] = identity.prove(moe, dense, made, sample()).equal
        assert identity.errors(moe, dense, made, sample(), parent_weights=False).equal <= 1e-5  # as written: exact
    assert errors["unit"] <= 1e-5  # 2 is exact
    assert errors["variance"] > 1e-4


def test_a_checkpoint_of_mixed_dtypes_has_the_tolerance_of_the_coarsest_ffn(tmp_path):
    dense = parent(tmp_path / "dense", "llama")
    edit(
        dense.folder,
        layers_1_mlp_down_proj_weight=lambda w: w.half(),
        layers_0_self_attn_q_proj_weight=torch.Tensor.bfloat16,
    )
    dense = Streamed(dense.folder)
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["random"] | {"scale": "variance"}))
    assert identity.stored_dtype(dense, made) == torch.float16
    assert 1e-5 < identity.prove(moe, dense, made, sample()).equal <= identity.TOLERANCE[torch.float16]


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"reinitialise": 0.5}, {"noise": 0.1, "reinitialise": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbed_copies_are_held_against_themselves_side_by_side(tmp_path, options, dtype):
    dense = parent(tmp_path / "dense", "llama", dtype=dtype)
    chosen = settings.Partition(**METHODS["slices of copies"] | options)
    moe, made = converted(dense, tmp_path / "moe", chosen)
    assert identity.errors(moe, dense, made, sample()).equal > 1e-3
    assert identity.prove(moe, dense, made, sample()).equal <= 1e-5


def test_a_refitted_down_projection_is_held_against_the_weights_as_written(dense_of, tmp_path):
    dense = dense_of("qwen2")
    chosen = settings.Partition(**METHODS["importance, inter"] | {"down_proj": "refit"})
    moe, made = converted(dense, tmp_path / "moe", chosen)
    assert identity.errors(moe, dense, made, sample()).equal > 1e-3
    assert identity.prove(moe, dense, made, sample()).equal <= 1e-5


def test_the_written_router_is_part_of_the_proof_where_all_experts_are_chosen(dense_of, tmp_path):
    dense = dense_of("llama")
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["random"] | {"top_k": 6}))
    assert identity.prove(moe, dense, made, sample()).as_written <= 1e-5
    edit(
        moe.folder, **{"1_block_sparse_moe_gate_weight": lambda w: torch.full_like(w, 0.1) * torch.arange(6)[:, None]}
    )
    moe = Streamed(moe.folder)
    ids = torch.from_numpy(sample())
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (moe.folder, dense.folder)]
    with torch.no_grad():
        ours, wanted = (model(input_ids=ids).logits for model in loaded)
    error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
    assert error > 1e-2
    assert identity.errors(moe, dense, made, sample()).as_written == pytest.approx(error, rel=1e-3)
    assert identity.errors(moe, dense, made, sample()).equal <= 1e-5
    with pytest.raises(identity.IdentityError, match="all experts on and the router as it was written, the logits"):
        identity.prove(moe, dense, made, sample())


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ({"kind": "mistral", "sliding_window": 3000, "max_position_embeddings": 9000}, {"sliding_window": 3001}),
        ({"kind": "mistral", "sliding_window": 8999, "max_position_embeddings": 9000}, {"sliding_window": 4000}),
        ({"kind": "mistral", "max_position_embeddings": 9000}, {"sliding_window": 8000}),
        (
            {"kind": "llama", "max_position_embeddings": 9000, "rope_parameters": models.LLAMA3 | {"factor": 1.0}},
            {"rope_scaling": models.LLAMA3 | {"factor": 1.001}},
        ),
        (
            {
                "kind": "llama", "max_position_embeddings": 9000,
                "rope_parameters": LONG | {
                    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 5000, "factor": 1.0
                },
            },
            {
                "rope_scaling": LONG | {
                    "rope_type": "longrope", "original_max_position_embeddings": 5000, "factor": 1.0,
                    "attention_factor": 1.0, "long_factor": [2.0, 3.0, 4.0, 5.1],
                },
            },
        ),
        (
            {
                "kind": "llama", "max_position_embeddings": 9000,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.1}},
        ),
    ],
)  # fmt: skip
def test_what_only_a_long_text_would_show_is_noticed(tmp_path, family, changes):
    dense = parent(tmp_path / "dense", **family)
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["random"]))
    identity.prove(moe, dense, made, sample((1, 20)))
    path = moe.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    changed = Streamed(moe.folder)
    assert identity.errors(changed, dense, made, sample((1, 20))).equal <= 1e-5 or "factor" in str(changes)
    with pytest.raises(identity.IdentityError, match=r"layer 0 sees|the rotary embeddings of positions"):
        identity.prove(changed, dense, made, sample((1, 20)))


def test_the_text_is_longer_than_a_window_where_that_is_cheap(dense_of, tmp_path):
    assert positions.text_length(parent(tmp_path / "a", "mistral", sliding_window=100)) == 144
    far = parent(tmp_path / "b", "mistral", sliding_window=700, max_position_embeddings=32_768)
    assert positions.text_length(far) == 716
    farther = parent(tmp_path / "c", "mistral", sliding_window=4096, max_position_embeddings=32_768)
    assert positions.text_length(farther) == 0


def test_the_text_stays_within_a_window_that_spans_all_positions_which_a_class_without_windows_may_drop(tmp_path):
    dense = parent(tmp_path / "dense", "mistral", sliding_window=128, max_position_embeddings=128)
    assert positions.text_length(dense) == positions.text_length(dense, least=500) == 128
    moe, made = converted(dense, tmp_path / "moe", settings.Partition(**METHODS["activation"]))
    assert moe.config.model_type == "granitemoeshared"
    identity.prove(moe, dense, made, sample((1, positions.text_length(dense))))

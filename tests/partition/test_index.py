"""The index file gives back what was written, with the same bytes, and says what is wrong with a damaged one."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tasks import settings
from tasks.partition import index


def an_index(*, layers=(1, 3), experts=3, shared=1, size=4, **options):
    """Every neuron once in each layer, except where a test changes it."""
    chosen = {"method": "activation", "experts": experts, "shared_experts": shared, "top_k": 2} | options
    rng = np.random.default_rng(0)
    rows = experts + shared
    return index.Index(
        layers={i: rng.permutation(rows * size).astype(np.int32).reshape(rows, size) for i in layers},
        scales={i: 2.0 + i for i in layers},
        shared_experts=shared,
        meta={"settings": settings.Partition(**chosen).model_dump(), "calibration": [["prose", 3]]},
    )


@given(
    layers=st.lists(st.integers(0, 200), min_size=1, max_size=5, unique=True),
    experts=st.integers(2, 5),
    shared=st.integers(0, 2),
    size=st.integers(1, 4),
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_a_file_gives_back_its_index_and_the_same_bytes(tmp_path_factory, layers, experts, shared, size):
    folder = tmp_path_factory.mktemp("index")
    made = an_index(layers=layers, experts=experts, shared=shared, size=size)
    index.write(made, folder / "a")
    read = index.read(folder / "a")
    index.write(read, folder / "b")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert list(read.layers) == sorted(layers)
    for i in layers:
        np.testing.assert_array_equal(read.layers[i], made.layers[i])
    assert read.scales == made.scales
    assert read.meta == made.meta
    assert (read.experts, read.shared_experts, read.expert_size) == (experts, shared, size)
    assert read.problems((experts + shared) * size) == []


def test_other_programs_read_it_as_plain_safetensors(tmp_path):
    made = an_index()
    index.write(made, tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    assert sorted(tensors) == ["layers.0001", "layers.0003", "scales.0001", "scales.0003"]
    assert tensors["layers.0001"].dtype == np.int32
    assert tensors["scales.0003"] == np.float32(5)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def _change(path, *, drop=(), tensors=(), **metadata):
    """Write the file anew with other metadata or tensors."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    old = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    kept = {name: value for name, value in (old | metadata).items() if name not in drop}
    kept_tensors = {name: value for name, value in load_file(path).items() if name not in drop}
    save_file(kept_tensors | dict(tensors), path, metadata=kept)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "not readable as a partition index"),
        (lambda path: path.unlink(), "not readable as a partition index"),
        (lambda path: path.write_text("{}"), "not readable as a partition index"),
        (lambda path: _change(path, format="1"), "format 1, made by an older version"),
        (lambda path: _change(path, format="3"), "format 3, made by another version"),
        (lambda path: _change(path, drop=["meta", "shared_experts"]), "metadata has no meta, shared_experts"),
        (lambda path: _change(path, meta="{"), "its metadata is damaged"),
        (lambda path: _change(path, meta="[]"), "its metadata is damaged"),
        (lambda path: _change(path, shared_experts="one"), "its metadata is damaged"),
        (lambda path: _change(path, shared_experts="4"), "4 shared experts of 4"),
        (lambda path: _change(path, drop=["scales.0003"]), r"layers \[1, 3\] and scales for \[1\]"),
        (
            lambda path: _change(path, tensors={"scales.0001": np.zeros((), np.float32)}),
            "scales must be finite and not 0",
        ),
        (lambda path: _change(path, tensors={"layers.0001": np.zeros((4, 4))}), r"`layers.0001` \(float64 \[4, 4\]\)"),
        (lambda path: _change(path, tensors={"router": np.zeros(3, np.int32)}), "`router` .* has no place"),
    ],
)
def test_every_damage_is_told_with_the_file_and_the_fix(tmp_path, damage, message):
    path = tmp_path / "partition.safetensors"
    index.write(an_index(), path)
    damage(path)
    with pytest.raises(ValueError, match=f"(?s)^{path}: .*{message}.*run the partition stage$"):
        index.read(path)


def test_a_neuron_in_two_places_is_told_with_its_layer():
    made = an_index()
    made.layers[3][0, 0] = made.layers[3][1, 0]
    (problem,) = made.problems(16)
    assert problem.startswith("layer 3 is no partition of the 16 neurons")


def test_an_index_of_another_ffn_is_told():
    size, *beyond = an_index().problems(12)
    assert size == "its experts have 4 neurons, by its settings 3"
    assert len(beyond) == 2
    assert [text.partition(" has ")[0] for text in beyond] == ["layer 1", "layer 3"]


def test_sizes_unlike_its_settings_and_layers_unlike_each_other_are_told():
    made = an_index()
    made.meta["settings"]["experts"] = 4
    assert "1 shared and 3 routed ones, in its settings 1 and 4" in made.problems(16)[0]
    made = an_index()
    made.layers[3] = made.layers[3].reshape(2, 8)
    assert "layer 3 has the shape (2, 8)" in made.problems(16)[0]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "no `settings`"),
        ({"settings": {"method": "magic", "experts": 3, "top_k": 2}}, "settings are not valid here: method:"),
        ({"settings": {"method": "random", "experts": 3, "top_k": 4}}, "top_k = 4 is more than experts = 3"),
    ],
)
def test_settings_that_are_not_there_or_not_valid_are_a_problem(meta, message):
    made = an_index()
    made.meta.clear()
    made.meta.update(meta)
    (problem,) = made.problems(16)
    assert message in problem


def test_copies_may_repeat_neurons_and_are_counted():
    copies = np.tile(np.arange(8, dtype=np.int32).reshape(2, 4), (3, 1))
    options = settings.Partition(method="copy", experts=6, top_k=2, expert_size=4)
    made = index.Index(layers={0: copies}, scales={0: 1.0}, shared_experts=0, meta={"settings": options.model_dump()})
    assert made.problems(8) == []
    assert made.times(0, width=8).tolist() == [3] * 8
    assert made.dropped(8) == 0
    made.layers[0][0, 0] = 7
    assert made.problems(8) != []


def test_the_share_of_dropped_neurons_is_the_mean_over_the_sparse_layers():
    kept = np.arange(8, dtype=np.int32).reshape(2, 4)
    made = index.Index(layers={0: kept, 2: kept % 4}, scales={0: 1.0, 2: 1.0}, shared_experts=0, meta={})
    assert made.dropped(10) == pytest.approx((0.2 + 0.6) / 2)

"""The shard writer against safetensors' own reader and transformers' own loader."""

import json
import random
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks.moe.writer import DTYPES, ShardWriter
from tests import models

PLAN = {"a": (torch.float32, (2, 3)), "b": (torch.bfloat16, (5,))}
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda n: n != "__metadata__"
)
entries = st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3).map(tuple))


def tensors(plan, seed=0):
    """Random bits of every tensor of a plan."""
    made = {}
    generator = torch.Generator().manual_seed(seed)
    for name, (dtype, shape) in plan.items():
        count = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
        made[name] = bits.view(dtype).reshape(shape)
    return made


def write(folder, content, *, shard_bytes=2_000_000_000, order=None):
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}
    with ShardWriter(folder, plan, shard_bytes=shard_bytes) as writer:
        for name in order or content:
            writer.write(name, content[name])


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@settings(max_examples=30, deadline=None)
@given(plan=st.dictionaries(names, entries, max_size=8), shard_bytes=st.integers(1, 400), seed=st.integers(0, 99))
def test_what_it_writes_is_what_safetensors_reads(plan, shard_bytes, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    content = tensors(plan, seed)
    order = list(content)
    random.Random(seed).shuffle(order)
    write(folder, content, shard_bytes=shard_bytes, order=order)
    read = {}
    for file in folder.glob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        part = load_file(file)
        assert len(part) <= 1 or sum(bits(tensor).numel() for tensor in part.values()) <= shard_bytes
        assert not set(part) & set(read)
        read |= part
    assert set(read) == set(content)
    for name, tensor in content.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(read[name]), bits(tensor))


def test_every_tensor_is_aligned_to_its_own_elements(tmp_path):
    kinds = {"flag": torch.bool, "wide": torch.float64, "half": torch.bfloat16, "full": torch.float32}
    write(tmp_path, tensors({name: (dtype, (3,)) for name, dtype in kinds.items()}))
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, dtype in kinds.items():
        assert (8 + size + header[name]["data_offsets"][0]) % dtype.itemsize == 0


def test_the_order_of_writing_leaves_no_trace_in_the_bytes(tmp_path):
    content = tensors({f"layers.{i}.weight": (torch.bfloat16, (i + 1, 3)) for i in range(20)})
    for folder, order in {"forwards": list(content), "backwards": list(content)[::-1]}.items():
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, content, shard_bytes=300, order=order)
    files = sorted(file.name for file in (tmp_path / "forwards").iterdir())
    assert "model.safetensors.index.json" in files
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "forwards" / name).read_bytes() == (tmp_path / "backwards" / name).read_bytes()


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    write(
        tmp_path,
        tensors({name: (torch.uint8, (size,)) for name, size in {"a": 9, "b": 50, "c": 9}.items()}),
        shard_bytes=20,
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("abc", 1)}
    assert index["metadata"] == {"total_size": 68}


def test_a_view_with_strides_is_written_as_its_values(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    write(tmp_path, {"columns": whole[:, ::2], "turned": whole.T})
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["columns"], whole[:, ::2])
    assert torch.equal(read["turned"], whole.T)


def test_an_unknown_name_a_second_write_and_another_dtype_or_shape_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, PLAN)
    writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'c' is not in the plan"):
        writer.write("c", torch.zeros(1))
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'a' is written a second time"):
        writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"'b' is torch.float32 \[5\], planned as torch.bfloat16 \[5\]"):
        writer.write("b", torch.zeros(5))
    with pytest.raises(ValueError, match=r"'b' is torch.bfloat16 \[1, 5\], planned as torch.bfloat16 \[5\]"):
        writer.write("b", torch.zeros(1, 5, dtype=torch.bfloat16))
    writer.write("b", torch.zeros(5, dtype=torch.bfloat16))
    writer.close()


def test_a_checkpoint_with_a_tensor_missing_cannot_be_finished(tmp_path):
    writer = ShardWriter(tmp_path, PLAN, shard_bytes=10)
    writer.write("b", torch.zeros(5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"1 tensors were not written: \['a'\]"):
        writer.close()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_an_error_on_the_way_is_not_hidden_by_the_missing_tensors(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, PLAN):
        raise ZeroDivisionError


def test_a_file_that_is_there_already_and_a_dtype_without_a_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'z': torch.complex64 is none that is written here; F64"):
        ShardWriter(tmp_path, {"z": (torch.complex64, (1,))})
    ShardWriter(tmp_path, {}).close()
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path, {})


def test_transformers_loads_the_shards_by_the_index(tmp_path):
    model = models.build("llama", dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    write(tmp_path, model.state_dict(), shard_bytes=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)

"""Checkpoints that somebody else wrote: which files make one up, what they hold, and whether that is sound.

Every refusal is a ValueError whose text names the file, the field or tensor, the value and the fix; the caller
puts the folder before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.moe import files

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_LARGEST = 2**31 - 1
_MALFORMED = (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, ArithmeticError)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Header:
    """Where and how a tensor is stored."""

    file: str
    dtype: str
    """As safetensors call it."""
    shape: tuple[int, ...]


def indexed(folder: Path) -> dict[str, str] | None:
    """The file of each tensor by model.safetensors.index.json; None where there is no index."""
    if not (folder / INDEX).is_file():
        return None
    listed = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{INDEX}: weight_map is no table of tensors and their files; fetch it again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX}: weight_map.{tensor} = {name!r} is no safetensors file in the folder of the index; correct "
                "it, or fetch the index again"
            )
    return listed


def headers(folder: Path, shards: Iterable[str], *, listed: Mapping[str, str] | None = None) -> dict[str, Header]:
    """Every tensor of some files, by their headers alone; derived rotary frequencies are left out.

    Args:
        folder: where the files are.
        shards: names of files.
        listed: what `indexed` gave; each tensor must then stand where the index says.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Header] = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                entries = {
                    name: Header(file=shard, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                    for name, part in parts.items()
                }
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard} is damaged or cut short ({error}); fetch it again") from None
        for name, entry in entries.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in tensors:
                raise ValueError(f"holds {name} twice, in {tensors[name].file} and {shard}; remove one")
            if entry.dtype not in _FLOATS:
                raise ValueError(
                    f"{shard}: {name} is stored as {entry.dtype}, which is no plain number; name the checkpoint that "
                    "it was quantised from"
                )
            tensors[name] = entry
    for name, shard in (listed or {}).items():
        if not name.endswith("rotary_emb.inv_freq") and (name not in tensors or tensors[name].file != shard):
            raise ValueError(f"{shard} does not hold {name}, which {INDEX} says; fetch both again")
    return tensors


def require_finite(tensor: torch.Tensor, *, name: str, file: str) -> None:
    """Raise ValueError for a tensor that holds NaN or infinity, with the first such place."""
    if _finite(tensor):
        return
    wrong = (~tensor.isfinite()).nonzero()
    place = wrong[0].tolist()
    raise ValueError(
        f"{file}: {name} holds {tensor[tuple(place)].item()} at {place}, and {len(wrong):,} of its {tensor.numel():,} "
        "numbers are not finite; fetch it again, or take a checkpoint from before its training broke"
    )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all of it is finite. NaN and infinity survive a sum, which costs a fortieth of a look at each one."""
    import torch

    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def not_finite(folder: Path) -> str:
    """What `require_finite` says of the first tensor of a checkpoint that is not finite; empty where all are."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    require_finite(file.get_tensor(name), name=name, file=path.name)
        except (ValueError, SafetensorError, OSError) as error:
            return str(error)
    return ""


def require_fits(stored: torch.Tensor, converted: torch.Tensor, *, name: str, file: str) -> None:
    """Raise ValueError for a tensor that holds NaN or infinity, or does so in its new dtype alone."""
    if _finite(converted):
        return
    require_finite(stored, name=name, file=file)
    raise ValueError(
        f"{file}: {name} holds {stored.abs().max().item():.4g}, too large for {converted.dtype}; set `dtype` of the "
        "model to float32"
    )


def check_config(fields: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Raise ValueError if numbers of a config.json cannot be, contradict each other, or the layers in the files.

    Args:
        fields: content of config.json.
        shapes: keyed by the tensors in the files.
    """
    for field, value in fields.items():
        if any(isinstance(each, float) and not math.isfinite(each) for each in _flat(value)):
            raise ValueError(f"config.json: {field} = {value}; needed: a finite number")
    for field in _SIZES:
        value = fields.get(field)
        if value is not None and (type(value) is not int or not 1 <= value <= _LARGEST):
            raise ValueError(f"config.json: {field} = {value!r}; needed: a whole number from 1 to {_LARGEST}")
    for field in ("rms_norm_eps", "rope_theta"):
        value = fields.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise ValueError(f"config.json: {field} = {value!r}; needed: a number above 0")
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if hidden and heads and not fields.get("head_dim") and hidden % heads:
        raise ValueError(
            f"config.json: hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; correct them, or "
            "give head_dim"
        )
    groups = fields.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ValueError(
            f"config.json: num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}; correct "
            "them"
        )
    seen = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    layers = fields.get("num_hidden_layers")
    if layers and seen and (len(seen) != layers or max(seen) != layers - 1):
        raise ValueError(
            f"config.json: num_hidden_layers = {layers}, and the files hold {len(seen)} layers, numbered "
            f"{min(seen)} to {max(seen)}; correct the config, or fetch the whole checkpoint"
        )


def _flat(value: Any) -> list[Any]:
    """The values in nested lists and tables."""
    left, flat = [value], []
    while left:
        each = left.pop()
        if isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list):
            left += each
        else:
            flat.append(each)
    return flat


def understood(make: Callable[[], Result], *, file: str) -> Result:
    """What a reader of a file gives; an error that is none of its own becomes a ValueError that names the file.

    Content that no reader foresees ends in any of Python's errors.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return make()
    except (*_MALFORMED, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be understood ({type(error).__name__}: {text}); fetch it again") from error

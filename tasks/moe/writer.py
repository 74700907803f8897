"""Writes a checkpoint's safetensors in place, tensor by tensor and in any order: nothing is collected in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls a dtype, and the dtype."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class _Slot:
    shard: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class ShardWriter:
    """The safetensors files of a plan, in a folder that has none yet.

    Tensors stand in the plan's order, in `model.safetensors`, or in `model-0000i-of-0000n.safetensors` of at most
    `shard_bytes` each with `model.safetensors.index.json`; a larger tensor has a shard of its own. Within a shard the
    wider dtypes come first, which keeps every tensor aligned. The same plan and tensors give the same bytes.

        with ShardWriter(folder, {"w": (torch.float32, (2, 3))}) as writer:
            writer.write("w", torch.zeros(2, 3))
    """

    def __init__(self, folder: Path, plan: Plan, *, shard_bytes: int = 2_000_000_000) -> None:
        """Create every file with its header.

        Raises:
            FileExistsError: one of the files is there already.
            ValueError: the plan has a dtype that safetensors files do not hold.
        """
        self.folder = folder
        self._slots: dict[str, _Slot] = {}
        self._files: list[int] = []
        shards = _shards(plan, shard_bytes)
        count = len(shards)
        names = [
            f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for i in range(count)
        ]
        self._paths = [folder / name for name in names]
        self._missing = dict.fromkeys(plan)
        self._total = sum(_bytes(*entry) for entry in plan.values())
        headers = [_header(tensors, plan) for tensors in shards]
        for shard, (header, end) in enumerate(headers):
            file = os.open(self._paths[shard], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files.append(file)
            os.fchmod(file, 0o644)  # whatever the umask
            _pwrite(file, memoryview(header), 0)
            os.truncate(file, len(header) + end)
            offset = len(header)
            for name in shards[shard]:
                dtype, shape = plan[name]
                self._slots[name] = _Slot(shard=shard, offset=offset, dtype=dtype, shape=tuple(shape))
                offset += _bytes(dtype, shape)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its slot. Raises ValueError if it is not in the plan, not as planned, or written."""
        slot = self._slots.get(name)
        if slot is None:
            raise ValueError(f"{self.folder}: tensor {name!r} is not in the plan of this checkpoint")
        path = self._paths[slot.shard]
        if name not in self._missing:
            raise ValueError(f"{path}: tensor {name!r} is written a second time")
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
            raise ValueError(
                f"{path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, planned as {slot.dtype} "
                f"{list(slot.shape)}"
            )
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        _pwrite(self._files[slot.shard], content, slot.offset)
        del self._missing[name]

    def close(self) -> None:
        """Bring everything to the disk. Raises ValueError listing the tensors of the plan that were not written."""
        try:
            if self._missing:
                raise ValueError(
                    f"{self.folder}: {len(self._missing)} tensors were not written: {list(self._missing)}"
                )
            for file in self._files:
                os.fsync(file)
        finally:
            self._release()
        if len(self._paths) > 1:
            weight_map = {name: self._paths[slot.shard].name for name, slot in self._slots.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _release(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _shards(plan: Plan, shard_bytes: int) -> list[list[str]]:
    """Names per shard, in the plan's order but for the dtypes' widths; one shard at least."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, entry in plan.items():
        size = _bytes(*entry)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return [sorted(shard, key=lambda name: -plan[name][0].itemsize) for shard in shards]


def _header(names: list[str], plan: Plan) -> tuple[bytes, int]:
    """The first bytes of a shard, and how many bytes of tensors follow."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = plan[name]
        if dtype not in _NAMES:
            raise ValueError(f"tensor {name!r}: {dtype} is none that is written here; {', '.join(DTYPES)} are")
        start, end = end, end + _bytes(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _pwrite(file: int, content: memoryview, offset: int) -> None:
    """os.pwrite in full; one call writes 2 GiB at most."""
    while content:
        done = os.pwrite(file, content, offset)
        content, offset = content[done:], offset + done

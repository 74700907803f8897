"""Tile sizes of the Triton kernels: a table in ``tiles.json``, no autotuner.

With an autotuner the ranks of one job could pick different tiles, and so different bits, and probing can exhaust the
memory of a ZeRO-3 run. A row of the table is a shape and the tile chosen for it, by arithmetic or (``measured``)
on a card by ``python -m bench.tune``; a lookup answers with the nearest shape. Every tile of the shipped table
is compiled ahead of time in the tests.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

Kernel = Literal["up", "down", "down_backward", "x_gradient", "w13_gradient", "w2_gradient"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
PATH = Path(__file__).with_name("tiles.json")
INTERPRETER = 0  # the architecture of Triton's interpreter in the table
# Octaves of distance that a tile costs for each share of its columns that would be padding: 0.2 counts like a width
# four times another.
_OCTAVES_PER_PADDING = 10


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One program's tile of a kernel: rows, columns and reduction depth, and how Triton compiles it.

    Row tiles are sorted rows, except in the two weight gradients, whose reduction runs over the rows and whose "rows"
    are those of the weight. ``up`` has two accumulators of this size. ``num_stages`` buffers hold operands that are on
    their way; ``group_m`` row tiles take turns at one column tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int


class Key(NamedTuple):
    """A kernel at a shape; the arguments of :func:`tile`, the architecture by :func:`family`."""

    arch: int
    kernel: Kernel
    itemsize: int
    rows_per_expert: float
    columns: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: a kernel at a shape, its tile, and the time and card if that was measured."""

    arch: int
    kernel: Kernel
    itemsize: int
    rows_per_expert: float
    columns: int
    depth: int
    tile: Tile
    measured: str | None = None

    @property
    def key(self) -> Key:
        return Key(self.arch, self.kernel, self.itemsize, self.rows_per_expert, self.columns, self.depth)

    def distance(self, key: Key) -> float:
        """From this row's shape to another, in octaves, plus what the tile pads there beyond what it pads here."""
        octaves = sum(
            abs(math.log2(max(here, 0.5)) - math.log2(max(there, 0.5)))
            for here, there in zip(self.key[3:], key[3:], strict=True)
        )
        return octaves + _OCTAVES_PER_PADDING * max(0.0, self._padding(key.columns) - self._padding(self.columns))

    def _padding(self, columns: int) -> float:
        padded = math.ceil(columns / self.tile.block_n) * self.tile.block_n
        return 1 - columns / max(padded, 1)


def tile(
    kernel: Kernel, *, rows_per_expert: float, columns: int, depth: int, itemsize: int, arch: int | None = None
) -> Tile:
    """The tile of one kernel.

    Args:
        kernel: its name.
        rows_per_expert: M / E, the mean number of routed rows of an expert.
        columns: width of the output (F for up and down_backward, D for down and x_gradient; of the weight gradients
            the last dimension of the weight).
        depth: the length of the reduction (of the weight gradients rows_per_expert).
        itemsize: bytes of an operand's element.
        arch: compute capability such as 90; by default that of Triton's current device. The interpreter has small
            tiles of its own, so that few rows make many tiles.

    Raises:
        ValueError: the device is none of NVIDIA's, or the table is broken.
    """
    if kernel in _forced:
        return _forced[kernel]
    served = family(current_arch() if arch is None else arch)
    return _shipped_tile(Key(served, kernel, 4 if itemsize > 2 else 2, rows_per_expert, columns, int(depth)))


def current_arch() -> int:
    """Compute capability of Triton's current device, :data:`INTERPRETER` under its interpreter."""
    import triton

    if triton.knobs.runtime.interpret:
        return INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        raise ValueError(f"{PATH}: no tiles for {target.backend} {target.arch}; call the layer with path='sorted'")
    return int(target.arch)


def family(arch: int) -> int:
    """The architecture in the table that serves a compute capability: mma.sync and cp.async with up to 99 KB of shared
    memory (80: also 86, 89 and 120), wgmma (90), tcgen05 (100: also 103)."""
    if arch < 80 or arch >= 120:
        return INTERPRETER if arch == INTERPRETER else 80
    return arch // 10 * 10


_forced: dict[str, Tile] = {}


@contextmanager
def forced(kernel: Kernel, candidate: Tile) -> Iterator[None]:
    """Inside the block :func:`tile` answers ``candidate`` for ``kernel``: how the tuner tries one. Not for threads."""
    _forced[kernel] = candidate
    try:
        yield
    finally:
        del _forced[kernel]


@lru_cache(maxsize=4096)
def _shipped_tile(key: Key) -> Tile:
    tile = nearest(shipped_table(), key)
    if tile is None:
        raise ValueError(f"{PATH}: no row of kernel {key.kernel!r}, arch {key.arch}, itemsize {key.itemsize}; add one")
    return tile


def nearest(rows: Iterable[Row], key: Key) -> Tile | None:
    """The tile of the row nearest to ``key`` of the same kernel, architecture and size of elements."""
    same = [row for row in rows if row.key[:3] == key[:3]]
    return min(same, key=lambda row: row.distance(key)).tile if same else None


@lru_cache
def shipped_table() -> tuple[Row, ...]:
    """The rows of the package's ``tiles.json``."""
    return load(PATH)


def load(path: Path) -> tuple[Row, ...]:
    """Reads and checks a table.

    Raises:
        ValueError: a row is broken; the message names the file, the row, the field, its value and the fix.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a tile table ({error}); it is an object with a list 'rows'") from error
    return tuple(_row(f"{path}: row {number}", row) for number, row in enumerate(rows))


def dump(rows: Iterable[Row], path: Path) -> None:
    """Writes a table, one row a line, in an order that keeps diffs small; by rename, so that no reader sees half."""
    lines = ",\n".join(f"    {json.dumps(asdict(row))}" for row in sorted(rows, key=lambda row: row.key))
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f'{{\n  "rows": [\n{lines}\n  ]\n}}\n')
    partial.replace(path)


def _row(where: str, row: Any) -> Row:
    def check(field: str, value: object, good: bool, fix: str) -> None:
        if not good:
            raise ValueError(f"{where}: {field} = {value!r}; {fix}")

    check("row", row, isinstance(row, dict), "a row is an object")
    for kind, values in ((Row, row), (Tile, row.get("tile"))):
        names = {field.name for field in fields(kind)}
        check("tile", values, isinstance(values, dict), "a tile is an object")
        check("fields", sorted(values), set(values) == names, f"they are {sorted(names)}")
    check("kernel", row["kernel"], row["kernel"] in KERNELS, f"one of {', '.join(KERNELS)}")
    check("itemsize", row["itemsize"], row["itemsize"] in (2, 4), "2 for fp16 and bf16, 4 for fp32")
    for field in ("arch", "columns", "depth"):
        check(field, row[field], type(row[field]) is int and row[field] >= 0, "an integer that is not negative")
    check("arch", row["arch"], family(row["arch"]) == row["arch"], "0 (interpreter), 80, 90 or 100")
    rows = row["rows_per_expert"]
    check("rows_per_expert", rows, type(rows) in (int, float) and rows > 0, "a positive number")
    check("measured", row["measured"], isinstance(row["measured"], str | None), "card and time, or null")
    for field, value in row["tile"].items():
        check(f"tile.{field}", value, type(value) is int and value > 0, "a positive integer")
        if field not in ("num_stages", "group_m"):
            check(f"tile.{field}", value, value & (value - 1) == 0, "a power of two")
        if field.startswith("block"):
            check(f"tile.{field}", value, value >= 16, "at least 16, the least that tl.dot multiplies")
    return Row(**row | {"tile": Tile(**row["tile"])})

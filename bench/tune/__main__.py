"""Fills the tile table: measures every kernel of the layer on the current device, at the shapes that matter.

    python -m bench.tune                                    # the shapes below, prints what would change
    python -m bench.tune --write                            # the same, into the package's tiles.json
    python -m bench.tune --shape 8192,16,4,4096,688 --kernel down_backward --write --table my.json
    python -m bench.tune --dry-run --arch 90                # no GPU: compiles the candidates, predicts times

A candidate is compiled and its registers and shared memory are looked at before it runs; it runs once and every output
and gradient is compared with the torch path before its time counts. With ``--write`` each finished kernel is stored at
once, and a run that was killed goes on where it stopped. Never called while training: ranks must agree on the tiles.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import triton
from moe_kernels import config
from moe_kernels.config import KERNELS, Kernel, Key, Row, Tile

from bench.kernels.shapes import Shape, parse_shape
from bench.tune.compile_only import Launch, no_device
from bench.tune.predict import candidates, gemm, seconds
from bench.tune.trial import Layer, Measure, Trial, measured, predicted

SHAPES = (
    Shape(32768, 16, 4, 4096, 688),  # LLaMA-MoE-3.5B 4/16
    Shape(8192, 16, 4, 4096, 688),
    Shape(8192, 8, 2, 4096, 1376),  # LLaMA-MoE-3.5B 2/8
    Shape(32768, 128, 8, 2048, 768),  # Qwen3-30B-A3B
    Shape(8192, 128, 8, 2048, 768),
    Shape(8192, 64, 8, 2048, 1024),  # OLMoE-1B-7B
    Shape(8192, 8, 2, 4096, 14336),  # Mixtral-8x7B
    Shape(8192, 40, 8, 1536, 512),  # Granite-3B-A800M
    Shape(8192, 16, 4, 4096, 896),  # Llama-3-8B in 16 experts
    Shape(8192, 16, 4, 2048, 352),  # TinyLlama in 16 experts
    Shape(8192, 48, 16, 576, 24),  # SmolLM2-135M in 48 experts
    Shape(512, 16, 4, 4096, 688),  # few rows an expert
    Shape(256, 16, 4, 4096, 688),
    Shape(64, 16, 4, 4096, 688),
    Shape(8, 16, 4, 4096, 688),  # decoding
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Within this much of the best time a tile that the table has already wins: fewer kernels to compile.
_TIE = 1.02


def median_ms(launch: Launch) -> float:
    """Median time of a launch, the L2 cache flushed before each."""
    return float(triton.testing.do_bench(launch, return_mode="median"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parse(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench.tune measures on a CUDA device and finds none; --dry-run --arch 90 compiles and predicts")
    dtype = DTYPES[args.dtype]

    def measure_at(shape: Shape) -> Measure:
        if args.dry_run:
            return predicted(Layer.make(shape, dtype=dtype, device="cpu"), shape, arch=args.arch)
        layer = Layer.make(shape, dtype=dtype, device="cuda")
        return measured(layer, arch=config.current_arch(), timer=median_ms)

    with no_device(args.arch) if args.dry_run else nullcontext():
        before = config.load(args.table) if args.table.exists() else ()
        after = fill(
            before,
            shapes=args.shape or SHAPES,
            kernels=args.kernel or KERNELS,
            arch=config.family(config.current_arch()),
            itemsize=dtype.itemsize,
            card=None if args.dry_run else torch.cuda.get_device_name(),
            most=args.candidates,
            again=args.again,
            measure_at=measure_at,
            store=(lambda rows: config.dump(rows, args.table)) if args.write else (lambda rows: None),
        )
    print_difference(before, after)


def fill(
    rows: Sequence[Row],
    *,
    shapes: Iterable[Shape],
    kernels: Iterable[Kernel],
    arch: int,
    itemsize: int,
    card: str | None,
    most: int,
    again: bool,
    measure_at: Callable[[Shape], Measure],
    store: Callable[[Sequence[Row]], None],
) -> tuple[Row, ...]:
    """The table with the fastest tile of each kernel at each shape.

    Args:
        rows: the table so far. What it has a measurement of on ``card`` is passed over unless ``again``.
        arch: of the table; see :func:`moe_kernels.config.family`.
        card: name of the device; None where times are predictions, which never replace a measurement.
        most: candidates tried for a kernel.
        measure_at: makes the measure of a shape, when the first kernel needs it.
        store: called with the table after each kernel.
    """
    kernels, rows = tuple(kernels), tuple(rows)
    for shape in shapes:
        measure = None
        for kernel in kernels:
            key = key_of(kernel, shape, arch=arch, itemsize=itemsize)
            if card and not again and any(row.key == key and card in (row.measured or "") for row in rows):
                print(f"{kernel} at {shape}: measured already", flush=True)
                continue
            print(f"{kernel} at {shape}", flush=True)
            measure = measure or measure_at(shape)
            tiles = promising(kernel, shape, itemsize=itemsize, arch=arch, most=most)
            best = fastest(kernel, tiles, measure=measure, known=[row.tile for row in rows if row.key[:3] == key[:3]])
            if best is not None and card:  # the model knows nothing of the order of programs
                orders = [replace(best[0], group_m=group) for group in (1, 4, 16)]
                best = min(best, fastest(kernel, orders, measure=measure, known=[]) or best, key=lambda pair: pair[1])
            if best is None:
                continue
            tile, milliseconds = best
            note = card and f"{milliseconds:.4f} ms, {card}, triton {triton.__version__}"
            rows = place(rows, Row(**key._asdict(), tile=tile, measured=note))
            store(rows)
    rows = without_redundant(rows)
    store(rows)
    return rows


def fastest(
    kernel: Kernel, tiles: Iterable[Tile], *, measure: Measure, known: Sequence[Tile]
) -> tuple[Tile, float] | None:
    """The tile that takes the least time, and its milliseconds; None if the card can run none of them."""
    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            trial = measure(kernel, tile)
        except (triton.CompilationError, triton.OutOfResources, torch.OutOfMemoryError) as error:
            trial = Trial(None, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
        if trial.milliseconds is not None:
            times[tile] = trial.milliseconds
        time = "refused" if trial.milliseconds is None else f"{trial.milliseconds:.4f} ms"
        print(f"  {describe(tile):24} {time:>12}  {trial.note}", flush=True)
    if not times:
        return None
    near = [tile for tile, time in times.items() if time <= _TIE * min(times.values())]
    chosen = min(near, key=lambda tile: (tile not in known, times[tile]))
    return chosen, times[chosen]


def promising(kernel: Kernel, shape: Shape, *, itemsize: int, arch: int, most: int) -> list[Tile]:
    """The ``most`` candidates of the least predicted time."""
    tiles = candidates(gemm(kernel, shape), itemsize=itemsize, arch=arch)
    return sorted(tiles, key=lambda tile: seconds(kernel, tile, shape, itemsize=itemsize, arch=arch))[:most]


def key_of(kernel: Kernel, shape: Shape, *, arch: int, itemsize: int) -> Key:
    """Where the host code looks for the kernel's tile at this shape."""
    work = gemm(kernel, shape)
    return Key(arch, kernel, itemsize, shape.rows_per_expert, work.columns, int(work.depth))


def place(rows: Sequence[Row], new: Row) -> tuple[Row, ...]:
    """The table with ``new`` in the place of the row of the same kernel and shape; arithmetic never replaces what was
    measured."""
    old = [row for row in rows if row.key == new.key]
    if new.measured is None and any(row.measured for row in old):
        return tuple(rows)
    return (*(row for row in rows if row.key != new.key), new)


def without_redundant(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The table without those unmeasured rows that change no answer: at the shape of every row it stays the same."""
    kept = list(rows)
    for row in rows:
        others = [other for other in kept if other is not row]
        alike = [other for other in rows if other.key[:3] == row.key[:3]]
        if row.measured is None and all(config.nearest(others, other.key) == other.tile for other in alike):
            kept = others
    return tuple(kept)


def describe(tile: Tile) -> str:
    """Such as ``128x64x64 w8 s3 g8``."""
    blocks = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{blocks} w{tile.num_warps} s{tile.num_stages} g{tile.group_m}"


def print_difference(before: Sequence[Row], after: Sequence[Row]) -> None:
    """One line for each row that was added, changed or dropped."""
    old, new = ({row.key: row for row in rows} for rows in (before, after))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            where = (
                f"{key.kernel} arch={key.arch} rows={key.rows_per_expert:g} columns={key.columns} depth={key.depth}"
            )
            tiles = (describe(rows[key].tile) if key in rows else "none" for rows in (old, new))
            print(f"{where}: {' -> '.join(tiles)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Measures tiles on this device and fills the tile table."
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="T,E,K,D,F", help="a layer; may be repeated"
    )
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this kernel; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--candidates", type=int, default=24, help="tiles tried, the most promising first (24)")
    parser.add_argument("--table", type=Path, default=config.PATH, help="the table (the package's)")
    parser.add_argument("--write", action="store_true", help="store the winners; without it the difference is printed")
    parser.add_argument("--again", action="store_true", help="measure also what the table has a measurement of")
    parser.add_argument("--dry-run", action="store_true", help="compile and predict, for any card, without one")
    parser.add_argument("--arch", type=int, default=90, choices=(80, 90, 100), help="the card of --dry-run (90)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

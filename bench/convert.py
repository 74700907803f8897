"""Converting a checkpoint with Llama-2-7B's shapes against copying its files: seconds, and the most memory it took.

    python -m bench.convert FOLDER --layers 32      # FOLDER takes 3 x 13.5 GB; made and removed

Either side runs in a process of its own, after the source's pages were dropped from the page cache and its last result
was deleted, and ends when its files are on the disk (fsync). The weights are random bfloat16; method random, 4 of 16.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from bench import common

HIDDEN, WIDTH, VOCABULARY = 4096, 11008, 32000
SHARD = 2_000_000_000
SIDES = ("copy", "convert")


def make(folder: Path, *, layers: int) -> None:
    """Write the dense checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tasks.moe.writer import ShardWriter

    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, dtype="bfloat16")
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (HIDDEN, WIDTH, VOCABULARY)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with ShardWriter(folder, {name: (torch.bfloat16, tuple(t.shape)) for name, t in state.items()}) as writer:
        for name, tensor in state.items():
            writer.write(name, torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(std=0.02))


def copy(source: Path, target: Path) -> None:
    """The floor: the same files, copied within the kernel."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb+") as written:
            os.fsync(written.fileno())


def convert(source: Path, target: Path) -> None:
    import torch

    from tasks import settings
    from tasks.moe.streamed import Streamed
    from tasks.partition import exporters, methods
    from tasks.partition.convert import ffn, moe_writer, slices
    from tasks.partition.layer import Layer, Sizes

    torch.set_num_threads(1)
    options = settings.Partition(method="random", experts=16, top_k=4)
    sizes = Sizes.of(options, WIDTH)
    parent = Streamed(source)
    split = methods.get("random").split

    exporter = exporters.choose(parent.config, options)
    with moe_writer(parent, target, exporter=exporter, partition=options, shard_bytes=SHARD) as write:
        for i in range(parent.layers):
            parent.prefetch(i + 1)
            gate, up, down = ffn(parent, i)
            experts_EF = split(Layer(number=i, gate_ND=gate, up_ND=up, down_DN=down), sizes, options)
            write(i, slices(gate, up, down, experts_EF, shared=0, scale=4.0))


def run(side: str, folder: Path) -> None:
    """Run one side in this process, and print what it took."""
    if side == "convert":  # not part of the time
        import tasks.partition.convert  # noqa: F401
    before, start = common.memory("VmRSS"), time.perf_counter()
    user = os.times()
    {"copy": copy, "convert": convert}[side](folder / "dense", folder / side)
    seconds, used = time.perf_counter() - start, os.times()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "user": used.user - user.user,
                "system": used.system - user.system,
                "before": before,
                "peak": common.memory("VmHWM"),
            }
        )
    )


def drop_pages(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2, help="how often both sides run, in turn")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        run(args.child, args.folder)
        return
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * WIDTH + 2 * HIDDEN)
    total = layer * args.layers + 4 * VOCABULARY * HIDDEN
    if shutil.disk_usage(args.folder.parent).free < 3 * total:
        raise SystemExit(f"{args.folder}: needs {3 * total / 1e9:.0f} GB of disk; take fewer --layers")
    make(args.folder / "dense", layers=args.layers)
    bound = 2 * layer + SHARD
    print(f"{args.layers} layers of Llama-2-7B, {total / 1e9:.2f} GB; two layers and a shard: {bound / 1e9:.2f} GB")
    print(f"{'':8}{'seconds':>9}{'user':>7}{'system':>8}{'GB/s':>7}{'peak GB':>9}{'of it imports':>15}")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        for _ in range(args.repeats):
            for side in SIDES:
                drop_pages(args.folder / "dense")
                taken = common.child("bench.convert", str(args.folder.resolve()), "--child", side)
                shutil.rmtree(args.folder / side)
                seconds[side].append(taken["seconds"])
                print(
                    f"{side:8}{taken['seconds']:9.1f}{taken['user']:7.1f}{taken['system']:8.1f}"
                    f"{total / taken['seconds'] / 1e9:7.2f}{taken['peak'] / 1e9:9.2f}{taken['before'] / 1e9:15.2f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(args.folder)
    print(f"convert / copy, best of each: {min(seconds['convert']) / min(seconds['copy']):.2f}")


if __name__ == "__main__":
    main()

"""Batches per CPU-second beside the same tokens through `datasets` and np.memmap, and packing beside its plain form.

    python -m bench.loader [data/corpora/demo] [--batch 256] [--seq-len 4096] [--world-size 8]

Without a corpus one is made: five domains, 90,400 documents of log-normal length, 65 M made-up ids.

Every rate is tokens handed to rank 0 per CPU-second of this process, threads included; all sides read windows or
documents in random order from files that are in the page cache. Then the first batch after a resume at step 10^7
beside that at step 0.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import common
from tasks.corpus import manifest, shards
from tasks.corpus.sampling.loader import Loader, train_windows
from tasks.corpus.sampling.packing import pack
from tasks.corpus.sampling.sampler import Sampler


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of each measurement")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        args.corpus = args.corpus or made_up(Path(folder))
        measure(args)


def made_up(folder: Path) -> Path:
    """A corpus whose documents have the lengths of five kinds of text, roughly."""
    from tests.corpus.handmade import corpus

    rng = np.random.default_rng(0)
    ids = rng.integers(1, 49_000, 1 << 22).astype(np.uint16)

    def documents(count: int, *, mu: float, sigma: float) -> list[np.ndarray]:
        lengths = np.clip(rng.lognormal(mu, sigma, count), 8, 60_000).astype(int)
        starts = rng.integers(0, len(ids) - lengths)
        return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    kinds = {
        "web": documents(20_000, mu=6.3, sigma=1.2),
        "code": documents(10_000, mu=6.6, sigma=1.3),
        "wiki": documents(20_000, mu=5.5, sigma=1.0),
        "books": documents(400, mu=9.9, sigma=0.8),
        "qa": documents(40_000, mu=5.0, sigma=0.8),
    }
    halves: dict[str, Any] = {
        name: [texts[: len(texts) // 2], texts[len(texts) // 2 :]] for name, texts in kinds.items()
    }
    return corpus(folder / "made-up", halves)


def measure(args: argparse.Namespace) -> None:
    """Print every side."""
    peers = {"datasets": datasets(args), "np.memmap": memmap(args)}
    rates = {name: rate(draw, args.seconds) for name, draw in peers.items()}
    for name, value in rates.items():
        print(f"{name:34} {value:8.1f} Mtok/CPU-s")
    sampler = sampler_of(args, "concat")
    print(f"{'plan of the global batch':34} {seconds(sampler.next, args.seconds) * 1e3:8.2f} CPU-ms")
    for packing in ("concat", "best_fit"):
        for mask in (False, True):
            for prefetch in (0, 2):
                with loader_of(args, packing, mask=mask, prefetch=prefetch) as one:
                    own = rate(partial(batch_tokens, one), args.seconds)
                name = f"{packing}{', mask' if mask else ''}{f', prefetch {prefetch}' if prefetch else ''}"
                ratios = "  ".join(f"{own / value:6.2f} x {peer}" for peer, value in rates.items())
                print(f"{name:34} {own:8.1f} Mtok/CPU-s  {ratios}")
    lengths = np.concatenate([np.diff(shards.offsets(shards.open_shard(path))) for path in paths(args.corpus)])
    mine = seconds(lambda: pack(lengths, seq_len=args.seq_len), args.seconds)
    theirs = seconds(lambda: bitset(lengths, args.seq_len), 0)
    assert len(pack(lengths, seq_len=args.seq_len)) == bitset(lengths, args.seq_len)
    million = len(lengths) / 1e6
    print(f"packing {million / mine:.2f} M documents/CPU-s, one by one {million / theirs:.2f}: {theirs / mine:.1f} x")
    start, late = (first_batch(args, step) for step in (0, 10**7))
    print(f"first batch at step 0 {start * 1e3:.2f} CPU-ms, at step 10^7 {late * 1e3:.2f}: {late / start:.2f} x")


def batch_tokens(loader: Loader) -> int:
    return loader.next().input_ids.size


def sampler_of(args: argparse.Namespace, packing: Any) -> Sampler:
    corpus = manifest.load(args.corpus)
    windows = train_windows(args.corpus, list(corpus.trained), seq_len=args.seq_len, packing=packing)
    weights = {domain: float(count > 0) for domain, count in windows.items()}
    return Sampler(windows, weights=weights, seed=0, batch=args.batch, corpus_sha256=corpus.sha256, packing=packing)


def loader_of(args: argparse.Namespace, packing: Any, *, mask: bool, prefetch: int) -> Loader:
    return Loader(
        args.corpus,
        sampler_of(args, packing),
        seq_len=args.seq_len,
        rank=0,
        world_size=args.world_size,
        packing=packing,
        mask_documents=mask,
        prefetch=prefetch,
    )


def memmap(args: argparse.Namespace) -> Callable[[], int]:
    """A rank's batch of random windows out of one raw file of all ids: nothing planned, no labels, no documents."""
    file = tempfile.NamedTemporaryFile(suffix=".bin")  # noqa: SIM115 (lives as long as the process)
    for path in paths(args.corpus):
        shards.flat_ids(shards.open_shard(path)).tofile(file)
    file.flush()
    ids = np.memmap(file.name, dtype=manifest.load(args.corpus).dtype, mode="r")
    rng, shape = np.random.default_rng(0), (args.batch // args.world_size, args.seq_len)

    def draw() -> int:
        out = np.empty(shape, dtype=np.int64)
        for row in out:
            start = int(rng.integers(0, len(ids) // args.seq_len)) * args.seq_len
            row[:] = ids[start : start + args.seq_len]
        return out.size

    return draw


def datasets(args: argparse.Namespace) -> Callable[[], int]:
    """Random documents through `Dataset.__getitem__` as numpy arrays."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(path)).select_columns("input_ids") for path in paths(args.corpus)]
    whole = concatenate_datasets(parts).with_format("numpy")
    rng = np.random.default_rng(0)
    return lambda: len(whole[int(rng.integers(len(whole)))]["input_ids"])


def bitset(lengths: np.ndarray, seq_len: int) -> int:
    """Best-fit-decreasing document by document, the rooms that bins have left in one Python integer; how many bins."""
    rests = lengths % seq_len
    waiting: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms, bins = 0, int((lengths // seq_len).sum())
    for rest in np.sort(rests[rests > 0])[::-1].tolist():
        if fitting := rooms >> rest:
            room = rest + (fitting & -fitting).bit_length() - 1
            chosen = waiting[room].pop()
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            room, chosen, bins = seq_len, bins, bins + 1
        if room > rest:
            waiting[room - rest].append(chosen)
            rooms |= 1 << (room - rest)
    return bins


def paths(corpus_dir: Path) -> list[Path]:
    domains = manifest.load(corpus_dir).domains.values()
    return [corpus_dir / shard.path for domain in domains for shard in domain.train.shards]


def first_batch(args: argparse.Namespace, step: int) -> float:
    """CPU seconds from a saved state to the batch after it, by a new sampler; median of 31."""
    one = loader_of(args, "best_fit", mask=True, prefetch=0)
    state = one.sampler.state()
    cursor = [int(step * args.batch * weight) for weight in one.sampler.weights.values()]
    state |= {"step": step, "cursor": cursor}

    def resume() -> None:
        one.sampler = Sampler.load(
            state, windows=one.sampler.windows, corpus_sha256=one.sampler.corpus_sha256, packing="best_fit"
        )
        one.next()

    return statistics.median(seconds(resume, 0) for _ in range(31))


def rate(draw: Callable[[], int], wanted: float) -> float:
    """Millions of tokens per CPU-second of `draw`, which returns how many it gave."""
    draw()
    tokens, begun = 0, time.process_time()
    while (spent := time.process_time() - begun) < wanted:
        tokens += draw()
    return tokens / spent / 1e6


def seconds(work: Callable[[], Any], wanted: float) -> float:
    """Mean CPU seconds of `work`, done at least once."""
    times, begun = 0, time.process_time()
    while True:
        work()
        times += 1
        if (spent := time.process_time() - begun) >= wanted:
            return spent / times


if __name__ == "__main__":
    main()

"""Export a corpus as Megatron's indexed datasets: `OUT/DOMAIN_SPLIT.bin` and `.idx`, one pair per domain and split.

    python -m tasks.tools.export_megatron data/corpora/NAME OUT [--split train]

Documents are in the order of the shards, separators included (what Megatron's `--append-eod` gives, for `eos`). A
document is one sequence. Train on it with `--data-path OUT/DOMAIN_train`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.corpus import files, manifest, shards
from tasks.corpus.readers.megatron import HEADER, MAGIC, VERSION
from tasks.corpus.records import CorpusError

STORED = {np.dtype(np.uint16): (8, "<u2"), np.dtype(np.uint32): (4, "<i4")}
"""Type of a shard's ids -> Megatron's code and type. It has no uint32."""
BLOCK = 1 << 22  # ids converted and written at once


def export(corpus_dir: Path, out: Path, *, splits: tuple[manifest.Split, ...] = manifest.SPLITS) -> dict[str, int]:
    """Write a corpus to `out`; returns the tokens of each pair, by its name without an ending.

    Layout: megatron/core/datasets/indexed_dataset.py. Streams: memory doesn't grow with the corpus. The index is
    written last, so that a pair with an index is whole.

    Raises:
        CorpusError: a shard that isn't as its manifest says, or a document too long for Megatron's int32.
        ValueError: no corpus is there, or a shard cannot be read.
    """
    corpus = manifest.load(corpus_dir)
    written = {}
    for name, domain in corpus.domains.items():
        for split in splits:
            prefix = out / f"{name}_{split}"
            part = domain.splits[split]
            if domain.unseen and split != "test":
                continue
            index = Path(f"{prefix}.idx")
            index.unlink(missing_ok=True)
            _write_ids(Path(f"{prefix}.bin"), corpus_dir, part)
            _write_index(index, corpus_dir, part, dtype=np.dtype(corpus.dtype))
            written[prefix.name] = part.tokens
    return written


def _write_ids(path: Path, corpus_dir: Path, part: manifest.SplitManifest) -> None:
    with files.replacing(path) as file:
        for shard in part.shards:
            ids = shards.flat_ids(shards.open_shard(corpus_dir / shard.path))
            if len(ids) != shard.tokens or int(ids.max()) > np.iinfo(np.int32).max:
                raise CorpusError(
                    f"{corpus_dir / shard.path}: {len(ids)} ids up to {ids.max()}, the manifest says {shard.tokens} "
                    f"up to {shard.max_id}; `moeforge repair {corpus_dir}`"
                )
            for start in range(0, len(ids), BLOCK):
                file.write(ids[start : start + BLOCK].astype(STORED[ids.dtype][1], copy=False).data)


def _write_index(path: Path, corpus_dir: Path, part: manifest.SplitManifest, *, dtype: np.dtype[Any]) -> None:
    code, stored = STORED[dtype]
    with files.replacing(path) as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, part.documents, part.documents + 1))
        for lengths in _lengths(corpus_dir, part):
            file.write(lengths.astype("<i4").data)
        end = 0
        for lengths in _lengths(corpus_dir, part):
            ends = end + np.cumsum(lengths) * np.dtype(stored).itemsize
            file.write(np.concatenate([[end], ends[:-1]]).astype("<i8").data)
            end = int(ends[-1])
        for start in range(0, part.documents + 1, BLOCK):
            file.write(np.arange(start, min(start + BLOCK, part.documents + 1), dtype="<i8").data)


def _lengths(corpus_dir: Path, part: manifest.SplitManifest) -> Iterator[NDArray[np.int64]]:
    """Tokens of each document of a split, a shard at a time."""
    for shard in part.shards:
        path = corpus_dir / shard.path
        lengths = np.diff(shards.offsets(shards.open_shard(path)))
        if len(lengths) != shard.documents or int(lengths.max()) > np.iinfo(np.int32).max:
            raise CorpusError(
                f"{path}: {len(lengths)} documents of up to {lengths.max()} tokens; the manifest says "
                f"{shard.documents}, and Megatron's index holds lengths up to 2^31 - 1"
            )
        yield lengths


def main() -> int:
    """Export the corpus named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.tools.export_megatron", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="a corpus directory, such as data/corpora/demo")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--split", choices=manifest.SPLITS, help="only this one; all otherwise")
    arguments = parser.parse_args()
    try:
        written = export(
            arguments.corpus, arguments.out, splits=(arguments.split,) if arguments.split else manifest.SPLITS
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for name, tokens in written.items():
        print(f"{arguments.out / name}.bin: {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

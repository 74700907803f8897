"""Peak memory of the corpus stage on little and on much input: zstd JSON lines, near-duplicates looked for.

    python -m bench.memory data/models/smollm2-135m-q4 [--megabytes 100 5000] [--workers 1]

Text is drawn from 50,000 made-up words by Zipf's law, one file of records of 2 to 6 kB. Prints the peak resident
memory of the largest process, CPU and wall seconds, and the ratio of the peaks.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard

from bench import common

SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "ost", "um")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", type=Path, help="a model directory; its tokenizer is used")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 5000])
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    peaks = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write(root / "text.jsonl.zst", megabytes)
            project(root, args.model.resolve())
            run(root, "tasks.corpus.fingerprint", "memory")
            began = time.perf_counter()
            used = run(root, "tasks.corpus", "memory", "--workers", str(args.workers))
            peaks.append(used.ru_maxrss / 1024)
            metrics = json.loads((root / "data/corpora/memory.json").read_text())
            cpu = used.ru_utime + used.ru_stime
            print(
                f"{megabytes:6} MB: peak {peaks[-1]:7.0f} MiB, {cpu:6.0f} CPU-s ({megabytes / cpu:.1f} MB/CPU-s), "
                f"{time.perf_counter() - began:6.0f} s, {metrics['tokens']:,} tokens, {metrics['encoder']['backend']}",
                flush=True,
            )
    print(f"ratio of the peaks: {peaks[-1] / peaks[0]:.2f}")


def write(path: Path, megabytes: int) -> None:
    """Write about that much text."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, size=50_000)
    words = np.array(["".join(rng.choice(SYLLABLES, size=n)) for n in lengths], dtype=object)
    left = megabytes * 10**6
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as stream:
        while left > 0:
            ranks = np.minimum(rng.zipf(1.2, size=1 << 18) - 1, len(words) - 1)
            drawn = words[ranks].tolist()
            cuts = np.cumsum(rng.integers(350, 700, size=800))
            for start, end in itertools.pairwise(cuts):
                text = " ".join(drawn[start:end])
                if text:
                    stream.write(b'{"text":"' + text.encode() + b'"}\n')
                    left -= len(text)


def project(root: Path, model: Path) -> None:
    """A project of one corpus."""
    (root / "data/models").mkdir(parents=True)
    (root / "data/models/any").symlink_to(model)
    corpus = {
        "model": "any",
        "near_duplicates": {},
        "domains": {"text": {"source": "dir:text.jsonl.zst", "format": "jsonl", "license": "CC0-1.0"}},
    }
    models = {"any": {"source": f"dir:{model}", "license": "Apache-2.0"}}
    (root / "pipelines.yaml").write_text(
        json.dumps({"models": models, "corpora": {"memory": corpus}, "pipelines": {}})
    )


def run(root: Path, module: str, *arguments: str) -> resource.struct_rusage:
    """Run a stage and give what it used, its children included."""
    environment = common.environment(RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    with subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=root, env=environment) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return used


if __name__ == "__main__":
    main()

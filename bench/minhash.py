"""MinHash signatures against datasketch, decontamination, and the near-duplicates of a real domain.

    python -m bench.minhash                                   # the licence texts of `corpora.demo.domains.legal`
    python -m bench.minhash --corpus wide --domain code

Rates are MB of UTF-8 per CPU-second of this process, the best of three rounds that alternate between both sides;
14 bands of 8 rows over 5-grams of words. datasketch hashes with xxHash, which is faster than its default of SHA-1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from datasketch import MinHash

from bench.common import cpu_seconds, parser
from tasks import settings, sources
from tasks.corpus.dedup import decontamination, duplicates, minhash, words
from tasks.settings.corpus import NearDuplicates

CACHE = Path(".scratch/sources")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--corpus", default="demo")
    options.add_argument("--domain", default="legal")
    args = options.parse_args(argv)
    texts = read(settings.load().corpus(args.corpus).domains[args.domain])
    near = NearDuplicates()
    signer = minhash.Signer(near.bands, near.rows, ngram=near.ngram)
    items = decontamination.Items([str(i) for i in range(1000)], sample(texts), ngram=13)
    part = texts[:: max(len(texts) // 100, 1)]  # datasketch is slow
    size = near.bands * near.rows
    hashes, strings = [hashed(signer, text) for text in part], [shingles(text, near.ngram) for text in part]
    flat, offsets = np.concatenate(hashes), np.cumsum([0] + [len(row) for row in hashes]).astype(np.uint64)

    print(f"{len(texts)} documents, {megabytes(texts):.1f} MB; datasketch on {megabytes(part):.1f} MB of them\n")
    print("| | datasketch | rensa | ratio |\n|---|---:|---:|---:|")
    row(
        "signatures from shingles",
        megabytes(part),
        lambda: datasketch(strings, size),
        lambda: minhash.minima(flat, offsets, size=size),
    )
    row(
        "bands from texts",
        megabytes(part),
        lambda: datasketch([shingles(text, near.ngram) for text in part], size),
        lambda: signer.bands(part),
    )
    print("\n| | MB per CPU-s |\n|---|---:|")
    for name, run in {
        "words": lambda: [words.split(texts[a:b]) for a, b in words.batches(texts)],
        "bands": lambda: signer.bands(texts),
        f"items, {items.ngrams} n-grams, all at once": lambda: items.hits(texts),
        "items, one by one": lambda: [items.hit(text) for text in texts],
    }.items():
        print(f"| {name} | {megabytes(texts) / min(cpu_seconds(run) for _ in range(3)):.0f} |")
    clusters(texts, signer, near=near)


def read(domain: settings.Domain) -> list[str]:
    """The texts of a domain of text files."""
    fetched = sources.fetch(domain.source, CACHE, sha256=domain.sha256, sdist=domain.sdist)
    return [fetched.fs.cat(path).decode(errors="replace") for path in fetched.paths]


def sample(texts: list[str]) -> list[str]:
    """A thousand items of 40 words each, of the domain's own words in another order: alike, and not contained."""
    rng = np.random.default_rng(0)
    pool = " ".join(texts[::20]).split()
    return [" ".join(rng.choice(pool, size=40)) for _ in range(1000)]


def shingles(text: str, ngram: int) -> list[bytes]:
    """What datasketch is given: the same shingles, as bytes."""
    split = words.split([text])
    each = split.text(0, len(split.hashes)).encode().split()
    return [b" ".join(each[i : i + ngram]) for i in range(max(len(each) - ngram + 1, 1))]


def hashed(signer: minhash.Signer, text: str) -> words.Hashes:
    return signer.shingles([text])[0]


def datasketch(strings: list[list[bytes]], size: int) -> None:
    for each in strings:
        MinHash(num_perm=size, hashfunc=xxhash.xxh32_intdigest).update_batch(each)


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def row(name: str, size: float, peer: Callable[[], object], own: Callable[[], object]) -> None:
    rounds = [(cpu_seconds(peer), cpu_seconds(own)) for _ in range(3)]
    theirs, ours = size / min(r[0] for r in rounds), size / min(r[1] for r in rounds)
    print(f"| {name} | {theirs:.1f} | {ours:.0f} | {ours / theirs:.0f} |")


def clusters(texts: list[str], signer: minhash.Signer, *, near: NearDuplicates) -> None:
    """Print what deduplication makes of the texts."""
    ids = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    bands = [band.tobytes() for band in signer.bands(texts)]
    table = pa.table({"doc_id": pa.array(ids, pa.binary(16)), "bands": pa.array(bands, pa.binary(8 * near.bands))})
    with tempfile.TemporaryDirectory() as folder:
        with pa.ipc.new_file(f"{folder}/chunk.arrow", table.schema) as writer:
            writer.write_table(table)
        decision = duplicates.decide([Path(folder, "chunk.arrow")], near=near, scratch=Path(folder))
        sizes = np.unique(decision.first[decision.outcome != duplicates.DUPLICATE], return_counts=True)[1]
        fates = np.bincount(decision.outcome, minlength=3)
        lost = sum(len(text.encode()) for text, fate in zip(texts, decision.outcome, strict=True) if fate) / 1e6
    print(
        f"\n{len(texts)} documents: {fates[0]} kept, {fates[1]} duplicates, {fates[2]} near-duplicates ({lost:.1f} MB "
        f"dropped) in {(sizes > 1).sum()} clusters, the largest of {sizes.max()}"
    )


if __name__ == "__main__":
    main()

"""Check every byte of a corpus against its manifest, for `moeforge verify`.

The manifest holds the sha256 of all other files. It is itself compared with the metrics beside the corpus
(data/corpora/NAME.json, which git keeps), the sidecars, the verdicts and the contents of the shards.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from tasks import scratch
from tasks.corpus import manifest, shards
from tasks.tools import shard_checks

PART = re.compile(r"part-(\d{5,})-(\d{3,})\.arrow")

Kind = Literal["manifest", "shard", "content", "sidecar", "records", "unlisted"]
"""shard: size or digests are wrong; content: they are right, and the contents wrong. records: verdicts or rejects."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a file of a corpus; `shard` is the manifest's entry for a shard or a sidecar."""

    kind: Kind
    path: Path
    text: str
    shard: manifest.Shard | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def verify_corpus(corpus_dir: Path) -> list[str]:
    """Everything that is wrong with a corpus, each line beginning with its file; empty if nothing is."""
    return [str(problem) for problem in problems(corpus_dir)]


def verify_shard(path: Path) -> list[str]:
    """Everything that is wrong with one shard of a corpus and its sidecar; empty if nothing is."""
    corpus_dir = path.parent.parent.parent
    corpus = _load(corpus_dir)
    if isinstance(corpus, Problem):
        return [str(corpus)]
    listed = {corpus_dir / shard.path: (domain, split, shard) for domain, split, shard in _shards(corpus)}
    if path not in listed:
        return [f"{path}: unlisted file, the manifest doesn't list it"]
    domain, split, shard = listed[path]
    return [str(problem) for problem in _shard_problems(path, shard, corpus, place=(domain, split))]


def problems(corpus_dir: Path) -> Iterator[Problem]:
    """Everything that is wrong with a corpus.

    Reads every byte: hashes and sizes of all files, ids against the vocabulary, separators around each document,
    counts, documents that stand twice, and files that the manifest doesn't list. Memory doesn't grow with the corpus.
    """
    corpus = _load(corpus_dir)
    if isinstance(corpus, Problem):
        yield corpus
        return
    yield from _manifest_problems(corpus_dir, corpus)
    expected = {corpus_dir / manifest.FILE}
    sound = []
    for domain, split, shard in _shards(corpus):
        path = corpus_dir / shard.path
        expected |= {path, shards.sidecar_of(path)}
        broken = list(_shard_problems(path, shard, corpus, place=(domain, split)))
        yield from broken
        if all(problem.kind == "sidecar" for problem in broken):
            sound.append(path)
    for path, text in shard_checks.repeats(sound):
        yield Problem(kind="content", path=path, text=text)
    for name, domain_entry in corpus.domains.items():
        expected |= {corpus_dir / path for path in domain_entry.files}
        yield from _record_problems(corpus_dir, name, domain_entry)
    for path in sorted(corpus_dir.rglob("*")):
        if path not in expected and not path.is_dir():
            yield Problem(kind="unlisted", path=path, text="unlisted file, the manifest doesn't list it")


def number_of(shard: manifest.Shard) -> tuple[int, int]:
    """The task that made a shard, and which of the task's shards it is. Raises ValueError for another name."""
    match = PART.fullmatch(Path(shard.path).name)
    if not match:
        raise ValueError(f"{shard.path}: not called part-TASK-NUMBER.arrow")
    return int(match[1]), int(match[2])


def _load(corpus_dir: Path) -> manifest.Manifest | Problem:
    path = corpus_dir / manifest.FILE
    try:
        return manifest.load(corpus_dir)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error).removeprefix(f"{path}: ")
        return Problem(kind="manifest", path=path, text=text if isinstance(error, ValueError) else f"damaged: {text}")


def _shards(corpus: manifest.Manifest) -> Iterator[tuple[str, str, manifest.Shard]]:
    for name, domain in corpus.domains.items():
        for split, part in domain.splits.items():
            for shard in part.shards:
                yield name, split, shard


def _manifest_problems(corpus_dir: Path, corpus: manifest.Manifest) -> Iterator[Problem]:
    path = corpus_dir / manifest.FILE
    metrics = corpus_dir.with_name(f"{corpus_dir.name}.json")
    if metrics.exists() and (known := _sha256_in(metrics)) != corpus.sha256:
        yield Problem(
            kind="manifest",
            path=path,
            text=f"sha256 is {corpus.sha256}, {metrics} says {known}; one of them is damaged or of another run",
        )
    for name, domain in corpus.domains.items():
        for split, part in domain.splits.items():
            totals = tuple(sum(getattr(s, key) for s in part.shards) for key in ("documents", "tokens", "text_bytes"))
            if totals != (part.documents, part.tokens, part.bytes):
                yield Problem(
                    kind="manifest",
                    path=path,
                    text=f"the {split} shards of {name} hold {totals} documents, tokens and text bytes, "
                    f"not {(part.documents, part.tokens, part.bytes)}",
                )


def _sha256_in(metrics: Path) -> str:
    try:
        return str(json.loads(metrics.read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        return f"nothing that can be read ({error!r})"


def _shard_problems(
    path: Path, shard: manifest.Shard, corpus: manifest.Manifest, *, place: tuple[str, str]
) -> Iterator[Problem]:
    """What is wrong with a shard and its sidecar; `place` is the domain and the split that list it."""
    if Path(shard.path).parts[:-1] != place or not PART.fullmatch(path.name):
        text = f"lists {shard.path} as a {place[1]} shard of {place[0]}, whose name is another"
        yield Problem(kind="manifest", path=path.parent.parent.parent / manifest.FILE, text=text)
        return
    for text in shard_checks.sidecar_faults(shards.sidecar_of(path), shard):
        yield Problem(kind="sidecar", path=shards.sidecar_of(path), text=text, shard=shard)
    texts = shard_checks.file_faults(path, shard)
    for text in texts or shard_checks.content_faults(path, shard, corpus, place=place):
        yield Problem(kind="shard" if texts else "content", path=path, text=text, shard=shard)


def _record_problems(corpus_dir: Path, name: str, domain: manifest.DomainManifest) -> Iterator[Problem]:
    """What is wrong with verdicts and rejects, and whether the verdicts give the counts of the manifest."""
    counts: Counter[str] = Counter()
    is_whole = True
    for path, sha256 in ((corpus_dir / path, sha256) for path, sha256 in domain.files.items()):
        text = shard_checks.missing(path)
        if not text and (digest := scratch.digest(path)) != sha256:
            text = f"sha256 is {digest}, the manifest says {sha256}"
        if text:
            is_whole = False
            yield Problem(kind="records", path=path, text=text)
        elif path.suffix == ".arrow":
            counts += _verdict_counts(path)
    if not is_whole:
        return
    rules = Counter(read=counts.total(), kept=sum(counts[split] for split in manifest.SPLITS))
    for verdict, count in counts.items():
        if verdict not in manifest.SPLITS:
            rules["bad" if verdict.startswith("bad: ") else verdict] += count
    if rules != Counter(domain.rules):  # a Counter: rules that dropped nothing don't matter
        text = f"rules of {name} are {domain.rules}, the verdicts say {dict(rules)}"
        yield Problem(kind="manifest", path=corpus_dir / manifest.FILE, text=text)


def _verdict_counts(path: Path) -> Counter[str]:
    with pa.memory_map(str(path)) as source:
        column = pa.ipc.open_file(source).read_all().column("verdict")
    return Counter({str(entry["values"]): entry["counts"] for entry in pc.value_counts(column).to_pylist()})

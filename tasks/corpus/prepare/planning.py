"""The plan of a corpus: its sources cut into tasks, and the units of work over them.

The work folder is `.scratch/corpus-NAME/FINGERPRINT/`; all processes and machines that take part must share it:

    plan-KEY.json                                the settings, the tasks, the keys of the work
    scan/DOMAIN-KEY/00000-000.arrow, .json …     documents of task 0 (chunk_store.py), and its summary 00000.json
    outcomes/KEY/DOMAIN/00000.npy, .json         the split of each document, or why it is dropped (resolve.py)
    tokenised/KEY/corpus/DOMAIN/…, done/DOMAIN/  shards and what is published with them (tokenise.py)

A KEY is a hash of everything that the work depends on (`Keys`), so that a changed setting keeps the work that it does
not affect. FINGERPRINT is a hash of the code.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar, get_args

from tasks import scratch, settings, sources
from tasks.corpus import source_versions
from tasks.corpus.filters import chain
from tasks.corpus.manifest import SPLITS
from tasks.corpus.readers.base import Piece
from tasks.corpus.readers.registry import READERS, open_reader
from tasks.corpus.records import CorpusError

SOURCES = scratch.ROOT / "sources"
Phase = Literal["scan", "resolve", "tokenise"]
T = TypeVar("T")
PHASES: tuple[Phase, ...] = get_args(Phase)


class PerThread(threading.local, Generic[T]):
    """What a function gives, kept for the thread that called it: a worker may run several, which must not share it."""

    def __init__(self, function: Callable[..., T], *, most: int) -> None:
        self.get = functools.lru_cache(maxsize=most)(function)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work: a task of a domain in a phase; `resolve` is one unit over all domains."""

    phase: Phase
    domain: str
    task: int


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Hashes of everything that the work of each phase depends on."""

    scans: dict[str, str]
    """Per domain: its source, and how it is read, filtered and decontaminated."""
    bands: dict[str, str]
    """Per domain: the settings of near-duplicates; empty if the corpus keeps them."""
    outcomes: str
    """The scans, and the settings of duplicates, splits and bad records."""
    shards: str
    """Everything that the bytes of a shard depend on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`tasks` are the pieces of input of each task, per domain in order of priority; `sizes` about their bytes.

    `sources` are the versions of all files.
    """

    path: Path
    """Its file in the work folder."""
    name: str
    keys: Keys
    corpus: settings.Corpus
    sources: source_versions.Versions
    tasks: dict[str, list[tuple[Piece, ...]]]
    sizes: dict[str, list[int]]

    def units(self, phase: Phase) -> list[Unit]:
        """The units of a phase, which may run in any order and anywhere."""
        if phase == "resolve":
            return [Unit(phase=phase, domain="", task=0)]
        return [Unit(phase=phase, domain=d, task=i) for d, tasks in self.tasks.items() for i in range(len(tasks))]


def keys_of(corpus: settings.Corpus, *, fingerprints: dict[str, str], tokenizer: str) -> Keys:
    """The keys of a corpus whose sources have these fingerprints (fingerprint.check)."""
    items = {part: text for part, text in fingerprints.items() if part.startswith("items ")}
    reading = corpus.model_dump(include={"max_record_bytes", "task_bytes", "keep_rejects", "decontaminate"})
    scans, bands = {}, {}
    for name, domain in corpus.domains.items():
        own = domain.model_dump(exclude={"heldout", "unseen", "license", "near_duplicates", "filters"})
        own["filters"] = [rule.model_dump() for rule in corpus.filters_of(name)]
        decoder = tokenizer if READERS[domain.format].has_ids else ""
        scans[name] = scratch.fingerprint([own, reading, fingerprints[f"domain {name}"], items, decoder])
        if corpus.near_duplicates:
            near = corpus.near_duplicates_of(name)
            how = near.model_dump(exclude={"action"}) if near else corpus.near_duplicates.bands
            bands[name] = scratch.fingerprint(how)
    action = corpus.near_duplicates.action if corpus.near_duplicates else ""
    # As pairs: the order of the domains is their priority.
    decided = [list(scans.items()), bands, action, [corpus.heldout_of(name) for name in corpus.domains]]
    return Keys(
        scans=scans,
        bands=bands,
        outcomes=scratch.fingerprint([decided, corpus.max_bad]),
        shards=scratch.fingerprint([decided, tokenizer, corpus.seed, corpus.separators, corpus.shard_tokens]),
    )


def tasks_of(corpus: settings.Corpus) -> tuple[dict[str, list[tuple[Piece, ...]]], dict[str, list[int]]]:
    """The tasks of each domain, and about how many bytes each has. Downloads packages and checks digests.

    Raises:
        SourceError: names the domain.
        CorpusError: also names it; a filter of it cannot be used here.
    """
    tasks, sizes = {}, {}
    for name, domain in corpus.domains.items():
        try:
            chain.build(corpus.filters_of(name))  # so that a missing package fails before anything is read
            reader = open_reader(domain, SOURCES, max_record_bytes=corpus.max_record_bytes)
            tasks[name] = reader.tasks(task_bytes=corpus.task_bytes)
            sizes[name] = [sum(map(reader.size, task)) for task in tasks[name]]
            splits = ("test",) if domain.unseen else SPLITS
            if domain.format == "text" and (files := sum(map(len, tasks[name]))) < len(splits):
                raise CorpusError(
                    f"{files} files are {files} documents, and {', '.join(splits)} need one each; give it more"
                )
        except sources.SourceError as error:
            raise sources.SourceError(f"domain {name}: {error}") from error
        except CorpusError as error:
            raise CorpusError(f"domain {name}: {error}") from error
    return tasks, sizes


def plan_file(work: Path, corpus: settings.Corpus, *, keys: Keys) -> Path:
    """The file of a corpus's plan in its work folder."""
    # Domains as a list: their order is their priority.
    key = scratch.fingerprint([dataclasses.asdict(keys), corpus.model_dump(), list(corpus.domains)])
    return work / f"plan-{key}.json"


def make(path: Path, name: str, *, corpus: settings.Corpus, keys: Keys, fingerprints: dict[str, str]) -> None:
    """Cut the sources of a corpus, which must have these fingerprints, into tasks, and write the plan to `path`.

    Raises:
        SourceError, CorpusError: as `tasks_of`, or a source changes meanwhile.
    """
    before = source_versions.record(corpus, SOURCES, fingerprints=fingerprints)
    tasks, sizes = tasks_of(corpus)
    if source_versions.record(corpus, SOURCES, fingerprints=fingerprints) != before:
        raise sources.SourceError("a source changed while it was listed; run again when nobody writes to it")
    content = {
        "name": name,
        "keys": dataclasses.asdict(keys),
        "corpus": corpus.model_dump(mode="json"),
        "domains": list(corpus.domains),  # their order is their priority, and write_json sorts keys
        "sources": before,
        "tasks": {name: [[dataclasses.asdict(piece) for piece in task] for task in tasks[name]] for name in tasks},
        "sizes": sizes,
    }
    scratch.write_json(path, content)


def load(path: Path) -> Plan:
    """Read a plan. Raises FileNotFoundError if this process doesn't see its file."""
    return _read(path, path.absolute())


@functools.lru_cache(maxsize=2)  # every unit asks for it; a plan never changes, and of a trillion tokens it is large
def _read(path: Path, where: Path) -> Plan:
    if not where.exists():
        raise FileNotFoundError(
            f"{path}: not found; every worker must run in the project's root, on a file system they share"
        )
    raw = json.loads(where.read_text())
    order, corpus, keys = raw.pop("domains"), raw["corpus"], raw["keys"]
    corpus["domains"] = {domain: corpus["domains"][domain] for domain in order}
    parsed = settings.Corpus.model_validate_json(json.dumps(corpus))  # of JSON, where the keys of a table are strings
    tasks = {domain: [tuple(Piece(**piece) for piece in task) for task in raw["tasks"][domain]] for domain in order}
    keys["scans"] = {domain: keys["scans"][domain] for domain in order}
    return Plan(**{**raw, "path": path, "keys": Keys(**keys), "corpus": parsed, "tasks": tasks})

"""What there is to do for a corpus: its sources cut into tasks, and the units of work over them.

Work lies in `.scratch/corpus-NAME/FINGERPRINT/`, which every process and machine that takes part must see:

    plan-KEY.json                                the settings, the tasks, the keys of the work
    scan/DOMAIN-KEY/00000-000.arrow, .json …     documents of task 0 (chunk_store.py), and its account 00000.json
    fates/KEY/DOMAIN/00000.npy, .json            what becomes of each of them (resolve.py)
    tokenised/KEY/corpus/DOMAIN/…, done/DOMAIN/  shards and what is published with them (tokenise.py)
    progress/                                    counters of each unit

A KEY names what that work was made from and nothing else (`Keys`), so that a setting that changes on the way leaves
the work that it does not touch. FINGERPRINT names the code.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tasks import scratch, settings, sources
from tasks.corpus import source_versions
from tasks.corpus.filters import chain
from tasks.corpus.manifest import SPLITS
from tasks.corpus.readers.base import Piece
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import CorpusError

SOURCES = scratch.ROOT / "sources"
Phase = Literal["scan", "resolve", "tokenise"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work: a task of a domain in a phase; `resolve` is one unit over all domains."""

    phase: Phase
    domain: str
    task: int


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What the work of each phase depends on, as fingerprints."""

    scans: dict[str, str]
    """Per domain: its source and how it is read, filtered and held against evaluation items."""
    bands: dict[str, str]
    """Per domain: how near-duplicates are looked for; empty if they aren't."""
    fates: str
    """The scans, and what decides on duplicates, splits and too many bad records."""
    shards: str
    """All that a shard's bytes depend on."""


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


def keys_of(corpus: settings.Corpus, *, found: dict[str, str], tokenizer: str) -> Keys:
    """The keys of a corpus whose sources have the fingerprints `found` (fingerprint.check)."""
    items = {part: text for part, text in found.items() if part.startswith("items ")}
    reading = corpus.model_dump(include={"max_record_bytes", "task_bytes", "keep_rejects", "decontaminate"})
    scans, bands = {}, {}
    for name, domain in corpus.domains.items():
        own = domain.model_dump(exclude={"heldout", "license", "near_duplicates", "filters"})
        own["filters"] = [rule.model_dump() for rule in corpus.filters_of(name)]
        decoder = tokenizer if domain.format == "megatron" else ""
        scans[name] = scratch.fingerprint([own, reading, found[f"domain {name}"], items, decoder])
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
        fates=scratch.fingerprint([decided, corpus.max_bad]),
        shards=scratch.fingerprint([decided, tokenizer, corpus.seed, corpus.separators, corpus.shard_tokens]),
    )


def tasks_of(corpus: settings.Corpus) -> tuple[dict[str, list[tuple[Piece, ...]]], dict[str, list[int]]]:
    """The tasks of each domain, and about how many bytes each has. Downloads packages and checks digests.

    Raises:
        SourceError: names the domain.
        CorpusError: also names it; a filter of it cannot be used here.
    """
    found, sizes = {}, {}
    for name, domain in corpus.domains.items():
        try:
            chain.build(corpus.filters_of(name))  # what a filter needs should be missed before anything is read
            reader = open_reader(domain, SOURCES, max_record_bytes=corpus.max_record_bytes)
            found[name] = reader.tasks(task_bytes=corpus.task_bytes)
            sizes[name] = [sum(map(reader.size, task)) for task in found[name]]
            if domain.format == "text" and (files := sum(map(len, found[name]))) < len(SPLITS):
                raise CorpusError(
                    f"{files} files are {files} documents, and {', '.join(SPLITS)} need one each; give it more"
                )
        except sources.SourceError as error:
            raise sources.SourceError(f"domain {name}: {error}") from error
        except CorpusError as error:
            raise CorpusError(f"domain {name}: {error}") from error
    return found, sizes


def file(work: Path, corpus: settings.Corpus, *, keys: Keys) -> Path:
    """Where the plan of a corpus lies in its work folder."""
    # Domains as a list: their order is their priority.
    key = scratch.fingerprint([dataclasses.asdict(keys), corpus.model_dump(), list(corpus.domains)])
    return work / f"plan-{key}.json"


def make(path: Path, name: str, *, corpus: settings.Corpus, keys: Keys, found: dict[str, str]) -> None:
    """Cut the sources of a corpus, whose fingerprints are `found`, into tasks, and write the plan to `path`.

    Raises:
        SourceError, CorpusError: as `tasks_of`, or a source changes meanwhile.
    """
    before = source_versions.record(corpus, SOURCES, fingerprints=found)
    listed, sizes = tasks_of(corpus)
    if source_versions.record(corpus, SOURCES, fingerprints=found) != before:
        raise sources.SourceError("a source changed while it was listed; run again when nobody writes to it")
    tasks = {domain: [[dataclasses.asdict(piece) for piece in task] for task in listed[domain]] for domain in listed}
    written = {
        "name": name,
        "keys": dataclasses.asdict(keys),
        "corpus": corpus.model_dump(mode="json"),
        "domains": list(corpus.domains),  # their order is their priority, and write_json sorts keys
        "sources": before,
        "tasks": tasks,
        "sizes": sizes,
    }
    scratch.write_json(path, written)


def load(path: Path) -> Plan:
    """Read a plan. Raises FileNotFoundError with the mend: it isn't seen from here."""
    return _read(path, path.absolute())


@functools.lru_cache(maxsize=2)  # every unit asks for it; a plan never changes, and of a trillion tokens it is large
def _read(path: Path, where: Path) -> Plan:
    if not where.exists():
        raise FileNotFoundError(
            f"{path}: not found; every worker must run in the project's root, on a file system they share"
        )
    raw = json.loads(where.read_text())
    order = raw["domains"]
    corpus = raw["corpus"]
    corpus["domains"] = {domain: corpus["domains"][domain] for domain in order}
    parsed = settings.Corpus.model_validate_json(json.dumps(corpus))  # of JSON, where the keys of a table are strings
    tasks = {domain: [tuple(Piece(**piece) for piece in task) for task in raw["tasks"][domain]] for domain in order}
    scans = {domain: raw["keys"]["scans"][domain] for domain in order}
    return Plan(
        path=path,
        name=raw["name"],
        keys=Keys(**{**raw["keys"], "scans": scans}),
        corpus=parsed,
        sources=raw["sources"],
        tasks=tasks,
        sizes=raw["sizes"],
    )

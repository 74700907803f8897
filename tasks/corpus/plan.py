"""What there is to do for a corpus: its sources cut into tasks, and the units of work over them.

Work lies in `.scratch/corpus-NAME/FINGERPRINT/`, which every process and machine that takes part must see:

    plan.json                                the settings, the tasks, the inputs' key
    scan/DOMAIN/00000-000.arrow, .json …     documents of task 0 (spool.py), and its account 00000.json
    fates/DOMAIN/00000.npy, .json            what becomes of each of them (resolve.py)
    tokenised/corpus/DOMAIN/…, done/DOMAIN/  shards and what is published with them (tokenise.py)
    progress/                                counters of each unit
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tasks import scratch, settings, sources
from tasks.corpus import filters, readers, unchanged
from tasks.corpus.readers import Piece
from tasks.corpus.records import CorpusError

FILE = "plan.json"
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
class Plan:
    """`tasks` are the pieces of input of each task, per domain in order of priority; `key` names all inputs.

    `sources` are the versions of all files.
    """

    name: str
    key: str
    corpus: settings.Corpus
    sources: unchanged.Versions
    tasks: dict[str, list[tuple[Piece, ...]]]

    def units(self, phase: Phase) -> list[Unit]:
        """The units of a phase, which may run in any order and anywhere."""
        if phase == "resolve":
            return [Unit(phase=phase, domain="", task=0)]
        return [Unit(phase=phase, domain=d, task=i) for d, tasks in self.tasks.items() for i in range(len(tasks))]


def tasks_of(corpus: settings.Corpus) -> dict[str, list[tuple[Piece, ...]]]:
    """The tasks of each domain. Downloads packages and checks digests.

    Raises:
        SourceError: names the domain.
        CorpusError: also names it; a filter of it cannot be used here.
    """
    found = {}
    for name, domain in corpus.domains.items():
        try:
            filters.build(corpus.filters_of(name))  # what a filter needs should be missed before anything is read
            reader = readers.open_reader(domain, SOURCES, max_record_bytes=corpus.max_record_bytes)
            found[name] = reader.tasks(task_bytes=corpus.task_bytes)
        except sources.SourceError as error:
            raise sources.SourceError(f"domain {name}: {error}") from error
        except CorpusError as error:
            raise CorpusError(f"domain {name}: {error}") from error
    return found


def open_plan(work: Path, name: str, *, corpus: settings.Corpus, inputs: Any) -> Plan:
    """The plan of the work folder, made if it isn't there yet."""
    path = work / FILE
    if not path.exists():
        before = unchanged.note(corpus, SOURCES, fingerprints=inputs["sources"])
        tasks = {
            domain: [[dataclasses.asdict(piece) for piece in task] for task in tasks]
            for domain, tasks in tasks_of(corpus).items()
        }
        if unchanged.note(corpus, SOURCES, fingerprints=inputs["sources"]) != before:
            raise sources.SourceError("a source changed while it was listed; run again when nobody writes to it")
        key = scratch.fingerprint(inputs)
        # Domains as pairs: their order is their priority, and write_json sorts keys.
        domains = list(corpus.domains)
        values = corpus.model_dump(mode="json")
        written = {"name": name, "key": key, "corpus": values, "domains": domains, "tasks": tasks, "sources": before}
        scratch.write_json(path, written)
    return load(work)


def load(work: Path) -> Plan:
    """Read the plan of a work folder. Raises FileNotFoundError with the mend: it isn't seen from here."""
    return _read((work / FILE).absolute())


@functools.lru_cache(maxsize=2)  # every unit asks for it; a plan never changes, and of a trillion tokens it is large
def _read(path: Path) -> Plan:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not found; every worker must run in the project's root, on a file system they share"
        )
    raw = json.loads(path.read_text())
    order = raw["domains"]
    corpus = raw["corpus"]
    corpus["domains"] = {domain: corpus["domains"][domain] for domain in order}
    parsed = settings.Corpus.model_validate_json(json.dumps(corpus))  # of JSON, where the keys of a table are strings
    tasks = {domain: [tuple(Piece(**piece) for piece in task) for task in raw["tasks"][domain]] for domain in order}
    return Plan(name=raw["name"], key=raw["key"], corpus=parsed, tasks=tasks, sources=raw["sources"])

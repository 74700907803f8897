"""The resolve phase, one process: find duplicates over all domains, hold documents out, refuse too many bad records.

Writes `outcomes/KEY/DOMAIN/TASK.npy`, uint8 [documents of the task], indices into OUTCOMES, and beside it the row at
which each piece begins. A cluster of near-duplicates stands in one split. One that begins in an unseen domain is test
text in every domain, and an unseen domain loses the documents of clusters that begin in a trained one.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import files
from tasks.corpus.dedup import duplicates
from tasks.corpus.manifest import SPLITS
from tasks.corpus.prepare import chunk_store, rejects, scan
from tasks.corpus.prepare.planning import Plan
from tasks.corpus.records import CorpusError

OUTCOMES = (*SPLITS, "duplicate", "near_duplicate")
MILLION = 10**6


def outcomes_of(plan: Plan, domain: str, *, task: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Outcomes of a task's documents, uint8 [documents], and the row at which each of its pieces begins."""
    path = _path(plan, domain, task)
    return np.load(path, allow_pickle=False), json.loads(path.with_suffix(".json").read_text())


def result_file(plan: Plan) -> Path:
    """The file that is written last, with the counts of each domain."""
    return plan.path.parent / "outcomes" / plan.keys.outcomes / "resolved.json"


def counts_of(plan: Plan) -> dict[str, Any]:
    """Per domain: records by rule, and the bad ones by rule with the first example."""
    counts: dict[str, Any] = json.loads(result_file(plan).read_text())
    return counts


def resolve(plan: Plan) -> None:
    """Decide the outcome of every document.

    Raises:
        CorpusError: a domain has too many bad records, or nothing for one of its splits.
    """
    tasks = {domain: _summaries(plan, domain) for domain in plan.tasks}
    starts = {domain: _row_starts(plan, domain, summaries) for domain, summaries in tasks.items()}
    counts = {domain: _counts(tasks[domain], starts=starts[domain]) for domain in plan.tasks}
    for domain, by_kind in counts.items():
        if by_kind["rules"]["bad"] > plan.corpus.max_bad * by_kind["rules"]["read"]:
            raise _too_many_bad(plan, domain, by_kind, starts=starts[domain])
    ordered = [(domain, task) for domain in plan.tasks for task in range(len(tasks[domain]))]
    chunks = [path for domain, task in ordered for path in chunk_store.chunk_paths(scan.folder(plan, domain), task)]
    bands = [path for domain, task in ordered for path in scan.band_paths(plan, domain, task=task)]
    work = plan.path.with_name("resolve")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    decision = duplicates.decide(chunks, near=plan.corpus.near_duplicates, band_files=bands or None, scratch=work)
    sizes = [sum(summary["documents"] for summary in tasks[domain]) for domain in plan.tasks]
    shares = np.array([plan.corpus.heldout_of(domain) for domain in plan.tasks])
    ends, start = np.cumsum(sizes), 0
    for domain in plan.tasks:
        kept: Counter[str] = Counter()
        for task, summary in enumerate(tasks[domain]):
            mine = slice(start, start := start + summary["documents"])
            share = shares[np.searchsorted(ends, decision.first[mine], side="right")]
            outcomes = _outcomes(decision.outcome[mine], decision.key[mine], share)
            if plan.corpus.domains[domain].unseen:
                outcomes[(outcomes < len(SPLITS)) & (share < 1)] = OUTCOMES.index("near_duplicate")
            kept.update(dict(zip(OUTCOMES, np.bincount(outcomes, minlength=len(OUTCOMES)).tolist(), strict=True)))
            path = _path(plan, domain, task)
            scratch.write_json(path.with_suffix(".json"), starts[domain][task])
            with files.replacing(path) as file:
                np.save(file, outcomes, allow_pickle=False)
        _add_kept(domain, counts[domain]["rules"], kept, plan=plan)
    scratch.write_json(result_file(plan), counts)
    shutil.rmtree(work)


def _outcomes(decided: NDArray[np.uint8], key: NDArray[np.uint8], share: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The split of each document that is kept, decided by its key alone and not by order, shards or other documents.

    The first half of the key decides whether a document is held out, the second whether for validation or for test. A
    share of 1 is that of an unseen domain: all is for test.
    """
    low, high = np.ascontiguousarray(key).view("<u8").T
    split = np.where((low % MILLION) < share * MILLION, np.where(share < 1, 1 + high % 2, SPLITS.index("test")), 0)
    return np.where(decided == duplicates.KEPT, split, decided + len(SPLITS) - duplicates.DUPLICATE).astype(np.uint8)


def _path(plan: Plan, domain: str, task: int) -> Path:
    return result_file(plan).parent / domain / f"{task:05d}.npy"


def _summaries(plan: Plan, domain: str) -> list[dict[str, Any]]:
    summaries = [chunk_store.summary_of(scan.folder(plan, domain), task) for task in range(len(plan.tasks[domain]))]
    if missing := [task for task, summary in enumerate(summaries) if summary is None]:
        raise CorpusError(f"domain {domain}: {len(missing)} tasks are not scanned, the first is {missing[0]}")
    return [summary for summary in summaries if summary is not None]


def _row_starts(plan: Plan, domain: str, summaries: list[dict[str, Any]]) -> list[list[int]]:
    """The row in its file at which each piece of each task begins."""
    seen: Counter[str] = Counter()
    starts: list[list[int]] = []
    for pieces, summary in zip(plan.tasks[domain], summaries, strict=True):
        starts.append([])
        for piece, rows in zip(pieces, summary["rows"], strict=True):
            starts[-1].append(seen[piece.path])
            seen[piece.path] += rows
    return starts


def _counts(summaries: list[dict[str, Any]], *, starts: list[list[int]]) -> dict[str, dict[str, Any]]:
    rules: Counter[str] = Counter(read=0, bad=0, empty=0)
    bad: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for summary, begin in zip(summaries, starts, strict=True):
        rules["read"] += summary["records"]
        rules.update(summary["rules"])
        bad.update(summary["bad"])
        for rule, (piece, source, row, detail) in summary["examples"].items():
            examples.setdefault(rule, f"{source}, row {begin[piece] + row}: {detail}")
    rules["bad"] = bad.total()
    return {"rules": dict(rules), "bad": {rule: f"{n}, the first in {examples[rule]}" for rule, n in bad.items()}}


def _too_many_bad(
    plan: Plan, domain: str, by_kind: dict[str, dict[str, Any]], *, starts: list[list[int]]
) -> CorpusError:
    folder, bad, read = scan.folder(plan, domain), by_kind["rules"]["bad"], by_kind["rules"]["read"]
    lines = (line for task, begin in enumerate(starts) for line in rejects.lines(folder, task, starts=begin))
    counts = f"{bad} of {read} records are bad ({bad / read:.2%})"
    return rejects.too_many_bad(plan, domain, counts, rules=by_kind["bad"], examples=lines)


def _add_kept(domain: str, rules: dict[str, int], kept: Counter[str], *, plan: Plan) -> None:
    rules["duplicate"] = kept["duplicate"]
    if plan.corpus.near_duplicates:
        rules["near_duplicate"] = kept["near_duplicate"]
    rules["kept"] = sum(kept[split] for split in SPLITS)
    unseen = plan.corpus.domains[domain].unseen
    for split in ("test",) if unseen else SPLITS:
        if kept[split]:
            continue
        fix = f"{'Lower' if split == 'train' else 'Raise'} `heldout`, or give the domain more documents"
        if not rules["kept"]:
            others = "whether an earlier domain holds the same texts"
            fix = f"Check `source`, `format`, `text_field` and `filters`, and {others}"
        counts = ", ".join(f"{n} {rule}" for rule, n in rules.items() if n)
        raise CorpusError(
            f"domain {domain}: no document for the {split} split (records: {counts}; heldout = "
            f"{plan.corpus.heldout_of(domain)}). {fix}"
        )

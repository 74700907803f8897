"""The second phase, one process: duplicates over all domains, the hold-out, and whether too much was bad.

Writes `fates/KEY/DOMAIN/TASK.npy`, uint8 [documents of the task], indices into FATES, and beside it the number that
each piece's rows begin at. A cluster of near-duplicates lies on one side of the hold-out.
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
from tasks.corpus.build import chunk_store, rejects, scan
from tasks.corpus.build.planning import Plan
from tasks.corpus.dedup import duplicates
from tasks.corpus.manifest import SPLITS
from tasks.corpus.records import CorpusError

FATES = (*SPLITS, "duplicate", "near_duplicate")
MILLION = 10**6


def fate_of(plan: Plan, domain: str, *, task: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Fates of a task's documents, uint8 [documents], and the row at which each of its pieces begins."""
    path = _path(plan, domain, task)
    return np.load(path, allow_pickle=False), json.loads(path.with_suffix(".json").read_text())


def result(plan: Plan) -> Path:
    """What is written last."""
    return plan.path.parent / "fates" / plan.keys.fates / "resolved.json"


def resolved(plan: Plan) -> dict[str, Any]:
    """Per domain: records by rule, and the bad ones by rule with the first example."""
    return json.loads(result(plan).read_text())


def resolve(plan: Plan) -> None:
    """Decide what becomes of every document.

    Raises:
        CorpusError: a domain has too many bad records, or nothing for one of its splits.
    """
    tasks = {domain: _accounts(plan, domain) for domain in plan.tasks}
    starts = {domain: _row_starts(plan, domain, accounts) for domain, accounts in tasks.items()}
    found = {domain: _counts(plan, domain, tasks[domain], starts=starts[domain]) for domain in plan.tasks}
    for domain, counts in found.items():
        if counts["rules"]["bad"] > plan.corpus.max_bad * counts["rules"]["read"]:
            raise CorpusError(_too_bad(plan, domain, counts, accounts=tasks[domain], starts=starts[domain]))
    chunks = [path for domain in plan.tasks for path in _chunks(plan, domain, tasks[domain])]
    signed = [path for domain in plan.tasks for path in _bands(plan, domain, tasks[domain])]
    area = plan.path.with_name("resolve")
    shutil.rmtree(area, ignore_errors=True)
    area.mkdir()
    decision = duplicates.decide(chunks, near=plan.corpus.near_duplicates, signed=signed or None, scratch=area)
    sizes = [sum(account["documents"] for account in tasks[domain]) for domain in plan.tasks]
    shares = np.array([plan.corpus.heldout_of(domain) for domain in plan.tasks])
    ends, start = np.cumsum(sizes), 0
    for domain in plan.tasks:
        kept: Counter[str] = Counter()
        for task, account in enumerate(tasks[domain]):
            place = slice(start, start := start + account["documents"])
            share = shares[np.searchsorted(ends, decision.first[place], side="right")]
            fate = _fates(decision.fate[place], decision.key[place], share)
            kept.update(dict(zip(FATES, np.bincount(fate, minlength=len(FATES)).tolist(), strict=True)))
            path = _path(plan, domain, task)
            scratch.write_json(path.with_suffix(".json"), starts[domain][task])
            with files.replacing(path) as file:
                np.save(file, fate, allow_pickle=False)
        _add_kept(domain, found[domain]["rules"], kept, plan=plan)
    scratch.write_json(result(plan), found)
    shutil.rmtree(area)


def _fates(fate: NDArray[np.uint8], key: NDArray[np.uint8], share: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Held out by the key alone, so that neither order nor shards nor other documents matter.

    One half of the key decides whether, the other, which is independent of it, for validation or for test.
    """
    low, high = np.ascontiguousarray(key).view("<u8").T
    split = np.where((low % MILLION) < share * MILLION, 1 + high % 2, 0)
    return np.where(fate == duplicates.KEPT, split, fate + len(SPLITS) - duplicates.DUPLICATE).astype(np.uint8)


def _path(plan: Plan, domain: str, task: int) -> Path:
    return result(plan).parent / domain / f"{task:05d}.npy"


def _accounts(plan: Plan, domain: str) -> list[dict[str, Any]]:
    found = [chunk_store.account(scan.folder(plan, domain), task) for task in range(len(plan.tasks[domain]))]
    if missing := [task for task, account in enumerate(found) if account is None]:
        raise CorpusError(f"domain {domain}: {len(missing)} tasks are not scanned, the first is {missing[0]}")
    return [account for account in found if account is not None]


def _chunks(plan: Plan, domain: str, accounts: list[dict[str, Any]]) -> list[Path]:
    folder = scan.folder(plan, domain)
    return [
        path
        for task, account in enumerate(accounts)
        for path in chunk_store.chunk_paths(folder, task, chunks=account["chunks"])
    ]


def _bands(plan: Plan, domain: str, accounts: list[dict[str, Any]]) -> list[Path]:
    return [
        path
        for task, account in enumerate(accounts)
        for path in scan.band_paths(plan, domain, task=task, chunks=account["chunks"])
    ]


def _row_starts(plan: Plan, domain: str, accounts: list[dict[str, Any]]) -> list[list[int]]:
    """The row in its file at which each piece of each task begins."""
    seen: dict[str, int] = {}
    starts: list[list[int]] = []
    for pieces, account in zip(plan.tasks[domain], accounts, strict=True):
        starts.append([])
        for piece, rows in zip(pieces, account["rows"], strict=True):
            starts[-1].append(seen.get(piece.path, 0))
            seen[piece.path] = seen.get(piece.path, 0) + rows
    return starts


def _counts(
    plan: Plan, domain: str, accounts: list[dict[str, Any]], *, starts: list[list[int]]
) -> dict[str, dict[str, Any]]:
    rules: Counter[str] = Counter(read=0, bad=0, empty=0)
    bad: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for account, begin in zip(accounts, starts, strict=True):
        rules["read"] += account["records"]
        rules.update(account["rules"])
        bad.update(account["bad"])
        for rule, (piece, source, row, detail) in account["examples"].items():
            examples.setdefault(rule, f"{source}, row {begin[piece] + row}: {detail}")
    rules["bad"] = bad.total()
    return {"rules": dict(rules), "bad": {rule: f"{n}, the first in {examples[rule]}" for rule, n in bad.items()}}


def _too_bad(
    plan: Plan,
    domain: str,
    counts: dict[str, dict[str, Any]],
    *,
    accounts: list[dict[str, Any]],
    starts: list[list[int]],
) -> str:
    folder, bad, read = scan.folder(plan, domain), counts["rules"]["bad"], counts["rules"]["read"]
    lines = (
        line
        for task, account in enumerate(accounts)
        for line in rejects.lines(folder, task, chunks=account["chunks"], starts=starts[task])
    )
    shown = rejects.write(plan.path.with_name(f"rejects-{domain}.jsonl"), lines)
    found = f"{bad} of {read} records are bad ({bad / read:.2%})"
    return rejects.too_bad(domain, found=found, rules=counts["bad"], max_bad=plan.corpus.max_bad, shown=shown)


def _add_kept(domain: str, rules: dict[str, int], kept: Counter[str], *, plan: Plan) -> None:
    rules["duplicate"] = kept["duplicate"]
    if plan.corpus.near_duplicates:
        rules["near_duplicate"] = kept["near_duplicate"]
    rules["kept"] = sum(kept[split] for split in SPLITS)
    for split in SPLITS:
        if kept[split]:
            continue
        if not rules["kept"]:
            mend = (
                "Check `source`, `format`, `text_field` and `filters`, and whether an earlier domain holds the same "
                "texts"
            )
        else:
            mend = f"{'Lower' if split == 'train' else 'Raise'} `heldout`, or give the domain more documents"
        counts = ", ".join(f"{n} {rule}" for rule, n in rules.items() if n)
        raise CorpusError(
            f"domain {domain}: no document for the {split} split (records: {counts}; heldout = "
            f"{plan.corpus.heldout_of(domain)}). {mend}"
        )

"""A domain's documents into shards: deduplicate, hold out, tokenise, shuffle, cut, write. Continues where it was killed."""

from __future__ import annotations

import hashlib
import json
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from tasks import settings
from tasks.corpus import permutation, readers, shards
from tasks.corpus.encoder import Encoder
from tasks.corpus.readers import CorpusError, Document, Tally
from tasks.sources import Fetched

BATCH_CHARS = 1 << 21  # text given to the tokenizer at once: enough for every core, little enough for memory
SPLITS = ("train", "heldout")
MILLION = 10**6

Report = Callable[[int, int], None]
"""Called with documents and tokens done so far."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One domain to make: everything its bytes depend on."""

    name: str
    domain: settings.Domain
    corpus: settings.Corpus
    folder: Path
    """The corpus being made."""
    key: str
    """Names the inputs; part of every task key."""

    @property
    def heldout(self) -> float:
        return self.corpus.heldout if self.domain.heldout is None else self.domain.heldout


@dataclass(frozen=True, kw_only=True)
class Built:
    """What became of a domain: sidecars per split, records per rule, and what this run itself encoded."""

    splits: dict[str, list[dict[str, Any]]]
    rules: dict[str, int]
    bad: dict[str, str]
    encoded_tokens: int
    seconds: float


def doc_id(text: str) -> bytes:
    """xxh3-128 of a text after NFC and with every run of whitespace as one space."""
    return xxhash.xxh3_128_digest(
        " ".join(unicodedata.normalize("NFC", text).split()).encode("utf-8", "surrogatepass")
    )


def is_heldout(identity: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split: decided by its text alone, so order and shards don't matter."""
    return int.from_bytes(identity[:8], "little") % MILLION < share * MILLION


@dataclass
class _Part:
    """The part of a split that is being filled."""

    index: int = 0
    skip: int = 0
    """Documents of a part that is already committed, still to pass."""
    tokens: int = 0
    rows: list[shards.Row] = field(default_factory=list)


class Builder:
    """Makes one domain. `seen` holds the ids of documents kept in domains before it, and gains this one's."""

    def __init__(self, unit: Unit, encoder: Encoder, *, seen: set[bytes], report: Report) -> None:
        self.unit, self.encoder, self.seen, self.report = unit, encoder, seen, report
        self.tally = Tally()
        self.encoded_tokens = 0
        self.done: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._parts = {split: _Part() for split in SPLITS}
        self._documents = self._tokens = 0

    def run(self, fetched: Fetched) -> Built:
        """Read, and write every part that isn't there yet. Raises CorpusError naming the domain."""
        began = time.perf_counter()
        for split in SPLITS:
            self._resume(split)
        batch: list[tuple[str, Document, bytes]] = []
        size = 0
        for item in self._kept(fetched):
            split = item[0]
            if self._pass(split):
                continue
            batch.append(item)
            size += len(item[1].text)
            if size >= BATCH_CHARS:
                self._encode(batch)
                batch, size = [], 0
        self._encode(batch)
        for split in SPLITS:
            self._cut(split)
        self.tally.judge(self.unit.name, self.unit.corpus.max_bad)
        self._judge_splits()
        return Built(
            splits=self.done,
            rules=dict(self.tally.rules),
            bad={
                rule: f"{n} x {rule}, the first in {self.tally.examples[rule]}" for rule, n in self.tally.bad.items()
            },
            encoded_tokens=self.encoded_tokens,
            seconds=time.perf_counter() - began,
        )

    def _kept(self, fetched: Fetched) -> Iterator[tuple[str, Document, bytes]]:
        rules = self.tally.rules
        domain = self.unit.domain
        for rule in ("read", "bad", "empty", "duplicate", "kept"):
            rules[rule] += 0
        found = readers.documents(fetched, format=domain.format, text_field=domain.text_field, tally=self.tally)
        for document in found:
            if not document.text or document.text.isspace():
                rules["empty"] += 1
                continue
            identity = doc_id(document.text)
            if identity in self.seen:
                rules["duplicate"] += 1
                continue
            self.seen.add(identity)
            rules["kept"] += 1
            yield SPLITS[is_heldout(identity, self.unit.heldout)], document, identity

    def _resume(self, split: str) -> None:
        """Look for the next part: if it is committed, its documents are passed without tokenising them again."""
        part = self._parts[split]
        sidecar = shards.committed(self._path(split, part.index), self._task_key(split, part.index))
        part.skip = sidecar["documents"] if sidecar else 0
        if sidecar:
            self.done[split].append(sidecar)
            self._documents += sidecar["documents"]
            self._tokens += sidecar["tokens"]
            self.report(self._documents, self._tokens)

    def _pass(self, split: str) -> bool:
        part = self._parts[split]
        if not part.skip:
            return False
        part.skip -= 1
        if not part.skip:
            part.index += 1
            self._resume(split)
        return True

    def _encode(self, batch: list[tuple[str, Document, bytes]]) -> None:
        if not batch:
            return
        for (split, document, identity), ids in zip(
            batch, self.encoder.encode([document.text for _, document, _ in batch]), strict=True
        ):
            part = self._parts[split]
            size = len(document.text.encode("utf-8"))
            part.rows.append(
                shards.Row(ids=ids, doc_id=identity, source=document.source, row=document.row, text_bytes=size)
            )
            part.tokens += len(ids)
            self._tokens += len(ids)
            self.encoded_tokens += len(ids)
            if part.tokens >= self.unit.corpus.shard_tokens:
                self._cut(split)
        self._documents += len(batch)
        self.report(self._documents, self._tokens)

    def _cut(self, split: str) -> None:
        part = self._parts[split]
        if not part.rows:
            return
        unit = self.unit
        order = permutation.shuffled(
            len(part.rows), round_keys=permutation.key(unit.corpus.seed, unit.name, split, part.index)
        )
        metadata = {
            "format": "moeforge-shard-1",
            "tokenizer": self.encoder.fingerprint,
            "eos_token_id": str(self.encoder.eos_token_id),
            "domain": unit.name,
            "split": split,
            "task_key": self._task_key(split, part.index),
        }
        rows = [part.rows[i] for i in order]
        self.done[split].append(
            shards.write(self._path(split, part.index), rows, dtype=self.encoder.dtype, metadata=metadata)
        )
        self._parts[split] = _Part(index=part.index + 1)

    def _judge_splits(self) -> None:
        kept = self.tally.rules["kept"]
        for split in SPLITS:
            if not self.done[split]:
                raise CorpusError(
                    f"domain {self.unit.name}: none of its {kept} documents (of {self.tally.rules['read']} records read) "
                    f"went to the {split} split; `heldout` is {self.unit.heldout}. "
                    + (
                        f"{'Raise' if split == 'heldout' else 'Lower'} `heldout`, or give the domain more documents"
                        if kept
                        else "Check `source`, `format` and `text_field`, and whether an earlier domain holds the same"
                    )
                )

    def _path(self, split: str, index: int) -> Path:
        return self.unit.folder / self.unit.name / split / f"part-{index:05d}.arrow"

    def _task_key(self, split: str, index: int) -> str:
        facts = json.dumps([self.unit.key, self.unit.name, split, index])
        return hashlib.sha256(facts.encode()).hexdigest()

"""A domain's documents into shards: deduplicate, hold out, tokenise, shuffle, cut, write.

Continues where it was killed: parts whose sidecar stands are passed over, finished domains aren't read again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from tasks import scratch, settings
from tasks.corpus import permutation, readers, shards
from tasks.corpus.encoder import Encoder
from tasks.corpus.records import CorpusError, Document, Tally
from tasks.sources import Fetched

BATCH_CHARS = 1 << 21  # text given to the tokenizer at once: enough for every core, little enough for memory
SPLITS = ("train", "heldout")
MILLION = 10**6

Report = Callable[[int, int], None]
"""Called with documents and tokens done so far."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One domain to make: everything its bytes depend on.

    `folder` is the corpus being made; `key` names the inputs and is part of every task key.
    """

    name: str
    domain: settings.Domain
    corpus: settings.Corpus
    folder: Path
    key: str

    @property
    def heldout(self) -> float:
        """Share of documents held out."""
        return self.corpus.heldout if self.domain.heldout is None else self.domain.heldout

    def path(self, split: str, index: int) -> Path:
        """Where a part is written."""
        return self.folder / self.name / split / f"part-{index:05d}.arrow"

    def task_key(self, split: str, index: int) -> str:
        """Names a part's bytes: a shard with this key needs no further work."""
        return hashlib.sha256(json.dumps([self.key, self.name, split, index]).encode()).hexdigest()

    def committed(self, split: str, index: int) -> dict[str, Any] | None:
        """The sidecar of a part that is finished."""
        return shards.committed(self.path(split, index), self.task_key(split, index))


@dataclass(frozen=True, kw_only=True)
class Built:
    """What became of a domain: sidecars per split, records per rule, and what the run that finished it encoded."""

    splits: dict[str, list[dict[str, Any]]]
    rules: dict[str, int]
    bad: dict[str, str]
    encoded_tokens: int
    seconds: float


def doc_id(text: str) -> bytes:
    """xxh3-128 of a text after NFC and with every run of whitespace as one space."""
    return xxhash.xxh3_128_digest(" ".join(unicodedata.normalize("NFC", text).split()).encode())


def is_heldout(identity: bytes, share: float) -> bool:
    """Whether a document is held out: decided by its text alone, so neither order nor shards matter."""
    return int.from_bytes(identity[:8], "little") % MILLION < share * MILLION


def finished(unit: Unit, record: Path, *, seen: set[bytes]) -> Built | None:
    """A domain that was finished before, its document ids added to `seen`; None if there is work to do."""
    if not record.exists():
        return None
    built = Built(**json.loads(record.read_text()))
    paths = []
    for split, sidecars in built.splits.items():
        for index, sidecar in enumerate(sidecars):
            if unit.committed(split, index) != sidecar:
                return None
            paths.append(unit.path(split, index))
    for path in paths:
        seen.update(shards.open_shard(path).column("doc_id").to_pylist())
    return built


def finish(built: Built, record: Path) -> None:
    """Note that a domain is finished."""
    scratch.write_json(record, dataclasses.asdict(built))


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A document that is kept."""

    document: Document
    split: str
    identity: bytes


@dataclass
class _Part:
    """The part of a split that is being filled; `skip` counts documents of a committed part still to pass over."""

    index: int = 0
    skip: int = 0
    tokens: int = 0
    rows: list[shards.Row] = field(default_factory=list)


class Builder:
    """Makes one domain. `seen` holds the ids of documents kept in domains before it, and gains this one's."""

    def __init__(self, unit: Unit, encoder: Encoder, *, seen: set[bytes], report: Report) -> None:
        self.unit, self.encoder, self.seen, self.report = unit, encoder, seen, report
        self.tally = Tally()
        self.sidecars: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._parts = {split: _Part() for split in SPLITS}
        self._documents = self._tokens = self._encoded = 0

    def run(self, fetched: Fetched) -> Built:
        """Read, and write every part that isn't there yet. Raises CorpusError naming the domain."""
        began = time.perf_counter()
        try:
            self._write(fetched)
        except CorpusError as error:
            raise CorpusError(f"domain {self.unit.name}: {error}") from error
        tally = self.tally
        return Built(
            splits=self.sidecars,
            rules=dict(tally.rules),
            bad={rule: f"{n}, the first in {tally.examples[rule]}" for rule, n in tally.bad.items()},
            encoded_tokens=self._encoded,
            seconds=time.perf_counter() - began,
        )

    def _write(self, fetched: Fetched) -> None:
        for split in SPLITS:
            self._look_up(split)
        batch: list[_Item] = []
        size = 0
        for item in self._kept(fetched):
            if self._pass_over(item.split):
                continue
            batch.append(item)
            size += len(item.document.text)
            if size >= BATCH_CHARS:
                self._encode(batch)
                batch, size = [], 0
        self.tally.judge(self.unit.corpus.max_bad)
        if batch:
            self._encode(batch)
        for split in SPLITS:
            self._cut(split)
        self._judge_splits()

    def _kept(self, fetched: Fetched) -> Iterator[_Item]:
        rules, domain = self.tally.rules, self.unit.domain
        for rule in ("read", "bad", "empty", "duplicate", "kept"):
            rules[rule] = 0
        for document in readers.documents(
            fetched, format=domain.format, text_field=domain.text_field, tally=self.tally
        ):
            if not document.text or document.text.isspace():
                rules["empty"] += 1
                continue
            identity = doc_id(document.text)
            if identity in self.seen:
                rules["duplicate"] += 1
                continue
            self.seen.add(identity)
            rules["kept"] += 1
            yield _Item(document=document, split=SPLITS[is_heldout(identity, self.unit.heldout)], identity=identity)

    def _look_up(self, split: str) -> None:
        """See whether the part to fill is committed: then its documents aren't tokenised again."""
        part = self._parts[split]
        if sidecar := self.unit.committed(split, part.index):
            part.skip = sidecar["documents"]
            self.sidecars[split].append(sidecar)
            self._documents += sidecar["documents"]
            self._tokens += sidecar["tokens"]
            self.report(self._documents, self._tokens)

    def _pass_over(self, split: str) -> bool:
        part = self._parts[split]
        if not part.skip:
            return False
        part.skip -= 1
        if not part.skip:
            part.index += 1
            self._look_up(split)
        return True

    def _encode(self, batch: list[_Item]) -> None:
        for item, ids in zip(batch, self.encoder.encode([item.document.text for item in batch]), strict=True):
            part, document = self._parts[item.split], item.document
            part.rows.append(
                shards.Row(
                    ids=ids,
                    doc_id=item.identity,
                    source=document.source,
                    row=document.row,
                    text_bytes=len(document.text.encode()),
                )
            )
            part.tokens += len(ids)
            self._encoded += len(ids)
            self._tokens += len(ids)
            if part.tokens >= self.unit.corpus.shard_tokens:
                self._cut(item.split)
        self._documents += len(batch)
        self.report(self._documents, self._tokens)

    def _cut(self, split: str) -> None:
        """Write the part that was filled, its documents shuffled, and begin the next."""
        part, unit = self._parts[split], self.unit
        if not part.rows:
            return
        round_keys = permutation.key(unit.corpus.seed, unit.name, split, part.index)
        order = permutation.shuffled(len(part.rows), round_keys=round_keys)
        metadata = {
            "format": shards.FORMAT,
            "tokenizer": self.encoder.fingerprint,
            "eos_token_id": str(self.encoder.eos_token_id),
            "domain": unit.name,
            "split": split,
            "task_key": unit.task_key(split, part.index),
        }
        rows = [part.rows[i] for i in order]
        path = unit.path(split, part.index)
        self.sidecars[split].append(shards.write(path, rows, dtype=self.encoder.dtype, metadata=metadata))
        self._parts[split] = _Part(index=part.index + 1)

    def _judge_splits(self) -> None:
        rules, heldout = self.tally.rules, self.unit.heldout
        for split, sidecars in self.sidecars.items():
            if sidecars:
                continue
            if not rules["kept"]:
                mend = "Check `source`, `format` and `text_field`, and whether an earlier domain holds the same texts"
            else:
                mend = f"{'Raise' if split == 'heldout' else 'Lower'} `heldout`, or give the domain more documents"
            raise CorpusError(
                f"no document for the {split} split: {rules['read']} records read, {rules['kept']} documents kept, "
                f"heldout = {heldout}. {mend}"
            )

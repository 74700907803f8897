"""The first phase: a task's records are read, judged one by one, and the documents kept for the tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from tasks.corpus.build import chunk_store, planning, rejects
from tasks.corpus.build.counters import Meter
from tasks.corpus.build.planning import SOURCES, Plan
from tasks.corpus.dedup import decontamination, minhash
from tasks.corpus.filters import chain
from tasks.corpus.readers.base import Reader
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import CorpusError, Document, Record, Reject
from tasks.corpus.tokenizer.encoder import Encoder


def doc_id(text: str) -> bytes:
    """xxh3-128 of a text after NFC and with every run of whitespace as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(" ".join(text.split()).encode())


def decoded(document: Document, encode: Encoder) -> Document:
    """A document that came tokenised, without separators and with the text that the tokenizer gives back.

    Raises:
        CorpusError: an id is outside the vocabulary.
    """
    ids = document.ids
    if ids is None:
        return document
    if len(ids) and not 0 <= (extreme := ids.min() if ids.min() < 0 else ids.max()) < encode.vocab_size:
        raise CorpusError(
            f"{document.source}, document {document.row}: id {extreme} is outside the vocabulary of "
            f"{encode.vocab_size}; the file was made with another tokenizer"
        )
    ids = ids[1:] if len(ids) and ids[0] == encode.bos_token_id else ids
    ids = ids[:-1] if len(ids) and ids[-1] == encode.eos_token_id else ids
    return dataclasses.replace(document, text=encode.decode(ids.tolist()), ids=ids)


LEAST = 100  # bad records of a task after which its domain is judged while it is scanned
MARGIN = 4  # the rest of the input is granted so many times the records per byte that were seen


class _TooBad(Exception):
    """More records are bad than `max_bad` can allow; the text says how many."""


def folder(plan: Plan, domain: str) -> Path:
    """Where the chunks of a domain lie."""
    return plan.path.parent / "scan" / f"{domain}-{plan.keys.scans[domain]}"


def band_paths(plan: Plan, domain: str, *, task: int, chunks: int) -> list[Path]:
    """Where the bands of a task's documents lie, a file for each chunk; none if near-duplicates aren't looked for."""
    if domain not in plan.keys.bands:
        return []
    return chunk_store.band_paths(folder(plan, domain), task, chunks=chunks, key=plan.keys.bands[domain])


def is_done(plan: Plan, domain: str, *, task: int) -> bool:
    """Whether a task is scanned, and signed by the bands that the plan asks for."""
    account = chunk_store.account(folder(plan, domain), task)
    if account is None:
        return False
    return all(path.exists() for path in band_paths(plan, domain, task=task, chunks=account["chunks"]))


def scan(plan: Plan, *, domain: str, task: int, meter: Meter, load_encoder: Callable[[], Encoder]) -> None:
    """Scan one task; goes on after the last committed chunk. Raises CorpusError or SourceError naming the domain."""
    job = _Scan(plan, domain=domain, task=task, load_encoder=load_encoder)
    try:
        job.run(meter)
    except _TooBad as error:
        raise CorpusError(job.too_bad(str(error))) from None
    except CorpusError as error:
        raise CorpusError(f"domain {domain}: {error}") from error


def _open(path: Path, domain: str) -> Reader:
    """The reader of a domain, whose digest the plan in `path` has checked."""
    corpus = planning.load(path).corpus
    return open_reader(corpus.domains[domain], SOURCES, max_record_bytes=corpus.max_record_bytes, check=False)


class _Readers(threading.local):
    """The readers of a thread, since an open archive has one place; to list a source for each task would cost more."""

    def __init__(self) -> None:
        self.open = functools.lru_cache(maxsize=8)(_open)


_readers = _Readers()


class _Scan:
    def __init__(self, plan: Plan, *, domain: str, task: int, load_encoder: Callable[[], Encoder]) -> None:
        corpus = plan.corpus
        self.plan, self.domain, self.corpus, self.task = plan, domain, corpus, task
        self.load_encoder = load_encoder
        self.folder = folder(plan, domain)
        self.pieces = plan.tasks[domain][task]
        self.chunks: list[dict[str, Any]] = []
        self.bad = self._look = 0
        self.judge = chain.build(corpus.filters_of(domain))
        near = corpus.near_duplicates_of(domain)
        self.signer = minhash.Signer(near.bands, near.rows, ngram=near.ngram, digits=near.digits) if near else None
        self.items: decontamination.Items | None = None
        self.rows: list[int] = []
        self._piece = 0

    def run(self, meter: Meter) -> None:
        if chunk_store.account(self.folder, self.task) is not None:  # under other settings for near-duplicates
            self._take_up(meter)
            return
        self.reader = _readers.open(self.plan.path.resolve(), self.domain)
        if asked := self.corpus.decontaminate:
            self.items = decontamination.Items.load(asked, SOURCES, versions=self.plan.sources)
        with chunk_store.from_recorded_sources(
            self.folder,
            self.task,
            part=self.corpus.domains[self.domain],
            name=f"domain {self.domain}",
            fetched=self.reader.fetched(self.pieces),
            versions=self.plan.sources,
        ):
            self._take_up(meter)
            self._read(meter)
        chunk_store.finish(self.folder, self.task, chunks=self.chunks, rows=self.rows)
        records = sum(account["records"] for account in self.chunks)
        if self.bad >= LEAST and self.bad > self.corpus.max_bad * records:
            self._piece = len(self.pieces)
            self._require_hope(records=records)

    def _take_up(self, meter: Meter) -> None:
        """Go on from the chunks that are there."""
        self.chunks = chunk_store.committed(self.folder, self.task)
        self.bad = sum(sum(chunk["bad"].values()) for chunk in self.chunks)
        self._look = max(LEAST if self.corpus.max_bad else 1, self.bad)
        for index, path in enumerate(chunk_store.chunk_paths(self.folder, self.task, chunks=len(self.chunks))):
            self._sign(index, functools.partial(chunk_store.documents, path))
        for account in self.chunks:
            meter.rules.update({**account["rules"], **account["bad"]})
            meter.add(documents=account["records"])

    def _read(self, meter: Meter) -> None:
        skip = sum(account["records"] for account in self.chunks)
        chunk = chunk_store.Chunk()
        for number, record in enumerate(self._records(meter)):
            if number < skip:
                continue
            try:
                self._take(record, number=number, chunk=chunk)
            except _TooBad:
                self._commit(chunk, meter=meter)
                raise
            if chunk.is_full:
                self._commit(chunk, meter=meter)
                chunk = chunk_store.Chunk()
        if chunk.records:
            self._commit(chunk, meter=meter)

    def _records(self, meter: Meter) -> Iterator[Record]:
        for index, piece in enumerate(self.pieces):
            self._piece = index
            self.rows.append((yield from self.reader.read(piece)))
            meter.add(files=int(piece.start == 0))

    def _take(self, record: Record, *, number: int, chunk: chunk_store.Chunk) -> None:
        if isinstance(record, Reject):
            self._reject(record, number=number, chunk=chunk)
            return
        document = decoded(record, self.encode) if record.ids is not None else record
        reject, kept_text = self._judged(document)
        if reject is None:
            try:
                identity = doc_id(document.text)
            except UnicodeEncodeError as error:  # markup can name half of a surrogate pair
                reject = Reject(rule="invalid text", source=record.source, row=record.row, detail=str(error))
            else:
                chunk.document(document, record=number, piece=self._piece, doc_id=identity)
                return
        self._reject(reject, number=number, chunk=chunk, text=kept_text)

    def _reject(self, reject: Reject, *, number: int, chunk: chunk_store.Chunk, text: str | None = None) -> None:
        chunk.reject(reject, record=number, piece=self._piece, text=text)
        self.bad += reject.bad
        if reject.bad and self.bad >= self._look:
            self._look = 2 * self.bad
            self._require_hope(records=number + 1)

    def _require_hope(self, *, records: int) -> None:
        """Raise _TooBad if `max_bad` cannot be met any more, whatever the rest of the domain holds.

        The rest is granted MARGIN times as many records per byte as were seen, and that none of them is bad. A domain
        that is scanned whole is judged by resolve.
        """
        sizes, bad = self.plan.sizes[self.domain], self.bad
        seen = sum(map(self.reader.size, self.pieces[: self._piece]))
        seen += sum(min(self.reader.bytes_read(), self.reader.size(piece)) for piece in self.pieces[self._piece :][:1])
        for task, size in enumerate(sizes):
            if task != self.task and (account := chunk_store.account(self.folder, task)):
                records += account["records"]
                bad += sum(account["bad"].values())
                seen += size
        total = sum(sizes)
        if not 0 < seen < total:
            return
        if bad > self.corpus.max_bad * records * (1 + MARGIN * (total - seen) / seen):
            raise _TooBad(
                f"{bad} of the first {records} records are bad ({bad / records:.2%}), which the rest of the input "
                f"({1 - seen / total:.0%}) cannot make good"
            )

    def too_bad(self, found: str) -> str:
        """The message of a domain that is stopped in the scan, with an example of each rule; writes more examples."""
        counts: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for account in self.chunks:
            counts.update(account["bad"])
            for rule, (piece, source, row, detail) in account["examples"].items():
                start = self.pieces[piece].start
                after = f" after the cut at {start}" if start else ""
                examples.setdefault(rule, f"{source}, row {row}{after}: {detail}")
        rules = {rule: f"{count} of task {self.task}, the first in {examples[rule]}" for rule, count in counts.items()}
        path = self.plan.path.with_name(f"rejects-{self.domain}.jsonl")
        starts = [0] * len(self.pieces)
        shown = rejects.write(path, rejects.lines(self.folder, self.task, chunks=len(self.chunks), starts=starts))
        return rejects.too_bad(self.domain, found=found, rules=rules, max_bad=self.corpus.max_bad, shown=shown)

    def _judged(self, document: Document) -> tuple[Reject | None, str | None]:
        """Why a document is dropped, and its text if that is to be kept."""
        text = document.text

        def reject(rule: str) -> Reject:
            return Reject(rule=rule, source=document.source, row=document.row, bad=False)

        if not text or text.isspace():
            return reject("empty"), None
        if rule := self.judge(document):
            return reject(rule), text if self.corpus.keep_rejects else None
        return None, None

    @functools.cached_property
    def encode(self) -> Encoder:
        return self.load_encoder()

    def _decontaminate(self, chunk: chunk_store.Chunk) -> None:
        if not self.items:
            return
        found = chunk.documents
        hits = {i: hit for i, hit in enumerate(self.items.hits(found["text"])) if hit}
        if hits:
            chunk.drop(
                {
                    i: Reject(
                        rule="contaminated",
                        source=found["source"][i],
                        row=found["row"][i],
                        detail=f"{hit.item}: {hit.ngram}",
                        bad=False,
                    )
                    for i, hit in hits.items()
                }
            )

    def _commit(self, chunk: chunk_store.Chunk, *, meter: Meter) -> None:
        self._decontaminate(chunk)
        index = len(self.chunks)
        account = chunk_store.commit(self.folder, self.task, index=index, chunk=chunk)
        self.chunks.append(account)
        self._sign(index, lambda: chunk.documents)
        meter.rules.update({**account["rules"], **account["bad"]})
        meter.add(documents=chunk.records, bytes=chunk.chars)

    def _sign(self, index: int, load: Callable[[], Any]) -> None:
        """Write the bands of a chunk, unless they are there; `load` gives the columns of its documents."""
        paths = band_paths(self.plan, self.domain, task=self.task, chunks=index + 1)
        if not paths or paths[index].exists():
            return
        near, columns = self.corpus.near_duplicates, load()
        assert near is not None
        texts, doc_ids = (_listed(columns[name]) for name in ("text", "doc_id"))
        bands = self.signer.bands(texts) if self.signer else minhash.alone(doc_ids, near.bands)
        chunk_store.sign(paths[index], bands)


def _listed(column: Any) -> list[Any]:
    return column if isinstance(column, list) else column.to_pylist()

"""The scan phase: read the records of a task, filter them one by one, and keep the documents in chunks."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from tasks.corpus.dedup import decontamination, minhash
from tasks.corpus.filters import chain
from tasks.corpus.prepare import chunk_store, planning, rejects
from tasks.corpus.prepare.planning import SOURCES, Plan
from tasks.corpus.readers.base import Reader
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import CorpusError, Document, Record, Reject
from tasks.corpus.tokenizer.encoder import Encoder

MIN_BAD = 100  # bad records of a task before its domain can be stopped during the scan
MARGIN = 4  # the unread input is assumed to have this many times the records per byte seen so far


def doc_id(text: str) -> bytes:
    """xxh3-128 of a text after NFC and with every run of whitespace as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(" ".join(text.split()).encode())


def decoded(document: Document, encode: Encoder) -> Document:
    """A document with its text; one that came tokenised loses its separators and is decoded.

    Raises:
        CorpusError: an id is outside the vocabulary, or the loss mask has another length.
    """
    ids, mask = document.ids, document.loss_mask
    if ids is None:
        return document
    if mask is not None and len(mask) != len(ids):
        raise CorpusError(f"{document.source}, document {document.row}: {len(ids)} ids and a loss mask of {len(mask)}")
    if len(ids) and not 0 <= (extreme := ids.min() if ids.min() < 0 else ids.max()) < encode.vocab_size:
        raise CorpusError(
            f"{document.source}, document {document.row}: id {extreme} is outside the vocabulary of "
            f"{encode.vocab_size}; the file was made with another tokenizer"
        )
    begin = int(len(ids) > 0 and ids[0] == encode.bos_token_id)
    end = len(ids) - int(len(ids) > begin and ids[-1] == encode.eos_token_id)
    ids, mask = ids[begin:end], None if mask is None else mask[begin:end]
    return dataclasses.replace(document, text=encode.decode(ids.tolist()), ids=ids, loss_mask=mask)


class _TooManyBad(Exception):
    """More records are bad than `max_bad` can allow; the text says how many."""


def folder(plan: Plan, domain: str) -> Path:
    """Where the chunks of a domain lie."""
    return plan.path.parent / "scan" / f"{domain}-{plan.keys.scans[domain]}"


def band_paths(plan: Plan, domain: str, *, task: int) -> list[Path]:
    """The band files of a task, one for each chunk; none if the corpus keeps near-duplicates."""
    if domain not in plan.keys.bands:
        return []
    suffix = f".bands-{plan.keys.bands[domain]}"
    return [path.with_suffix(suffix) for path in chunk_store.chunk_paths(folder(plan, domain), task)]


def is_done(plan: Plan, domain: str, *, task: int) -> bool:
    """Whether a task is scanned and has the bands that the plan asks for."""
    if chunk_store.summary_of(folder(plan, domain), task) is None:
        return False
    return all(path.exists() for path in band_paths(plan, domain, task=task))


def scan(plan: Plan, *, domain: str, task: int, load_encoder: Callable[[], Encoder]) -> None:
    """Scan one task from its last committed chunk on. Raises CorpusError or SourceError naming the domain."""
    job = _TaskScan(plan, domain=domain, task=task, load_encoder=load_encoder)
    try:
        job.run()
    except _TooManyBad as error:
        raise job.too_many_bad(str(error)) from None
    except CorpusError as error:
        raise CorpusError(f"domain {domain}: {error}") from error


def _open(path: Path, domain: str) -> Reader:
    """The reader of a domain of the plan in `path`, which has checked the digest of its source."""
    corpus = planning.load(path).corpus
    return open_reader(corpus.domains[domain], SOURCES, max_record_bytes=corpus.max_record_bytes, check=False)


_readers = planning.PerThread(_open, most=8)
"""An open archive has one position, and listing a source takes long."""


class _TaskScan:
    def __init__(self, plan: Plan, *, domain: str, task: int, load_encoder: Callable[[], Encoder]) -> None:
        corpus = plan.corpus
        self.plan, self.domain, self.corpus, self.task = plan, domain, corpus, task
        self.load_encoder = load_encoder
        self.folder = folder(plan, domain)
        self.pieces = plan.tasks[domain][task]
        self.chunks: list[dict[str, Any]] = []  # summaries of the committed ones
        self.bad = 0
        self.next_check = 0  # bad records at which to estimate whether the domain can still meet `max_bad`
        self.filter = chain.build(corpus.filters_of(domain))
        near = corpus.near_duplicates_of(domain)
        self.signer = minhash.Signer(near.bands, near.rows, ngram=near.ngram, digits=near.digits) if near else None
        self.items: decontamination.Items | None = None
        self.rows: list[int] = []
        self.piece = 0

    def run(self) -> None:
        if chunk_store.summary_of(self.folder, self.task) is not None:  # all but the bands, which have other settings
            self._resume()
            return
        self.reader = _readers.get(self.plan.path.resolve(), self.domain)
        if settings := self.corpus.decontaminate:
            self.items = decontamination.Items.load(settings, SOURCES, versions=self.plan.sources)
        with chunk_store.reading(
            self.folder,
            self.task,
            part=self.corpus.domains[self.domain],
            name=f"domain {self.domain}",
            fetched=self.reader.fetched(self.pieces),
            versions=self.plan.sources,
        ):
            self._resume()
            self._read()
        chunk_store.commit_task(self.folder, self.task, chunks=self.chunks, rows=self.rows)
        records = sum(chunk["records"] for chunk in self.chunks)
        if self.bad >= MIN_BAD and self.bad > self.corpus.max_bad * records:
            self.piece = len(self.pieces)
            self._check_bad(records=records)

    def _resume(self) -> None:
        """Count the committed chunks, and write the bands that they lack."""
        self.chunks = chunk_store.chunk_summaries(self.folder, self.task)
        self.bad = sum(sum(chunk["bad"].values()) for chunk in self.chunks)
        self.next_check = max(MIN_BAD if self.corpus.max_bad else 1, self.bad)
        for index, path in enumerate(chunk_store.chunk_paths(self.folder, self.task)):
            self._write_bands(index, functools.partial(_signed_columns, path))

    def _read(self) -> None:
        skip = sum(chunk["records"] for chunk in self.chunks)
        chunk = chunk_store.Chunk()
        for number, record in enumerate(self._records()):
            if number < skip:
                continue
            try:
                self._add(record, number=number, chunk=chunk)
            except _TooManyBad:
                self._commit(chunk)
                raise
            if chunk.is_full:
                self._commit(chunk)
                chunk = chunk_store.Chunk()
        if chunk.records:
            self._commit(chunk)

    def _records(self) -> Iterator[Record]:
        for index, piece in enumerate(self.pieces):
            self.piece = index
            self.rows.append((yield from self.reader.read(piece)))

    def _add(self, record: Record, *, number: int, chunk: chunk_store.Chunk) -> None:
        """Put a record into the chunk, as a document or as a reject."""
        text = None
        if isinstance(record, Document):
            document = decoded(record, self.encode) if record.ids is not None else record
            rule, bad, detail = "", False, ""
            if not document.text or document.text.isspace():
                rule = "empty"
            elif dropped_by := self.filter(document):
                rule, text = dropped_by, document.text if self.corpus.keep_rejects else None
            else:
                try:
                    identity = doc_id(document.text)
                except UnicodeEncodeError as error:  # markup can name half of a surrogate pair
                    rule, bad, detail = "invalid text", True, str(error)
                else:
                    chunk.add(document, record=number, piece=self.piece, doc_id=identity)
                    return
            record = Reject(rule=rule, source=record.source, row=record.row, detail=detail, bad=bad)
        chunk.reject(record, record=number, piece=self.piece, text=text)
        self.bad += record.bad
        if record.bad and self.bad >= self.next_check:
            self.next_check = 2 * self.bad
            self._check_bad(records=number + 1)

    def _check_bad(self, *, records: int) -> None:
        """Raise _TooManyBad if the domain cannot meet `max_bad` any more, whatever its unread input holds.

        The estimate grants the unread input MARGIN times as many records per byte as were seen, all of them good. A
        domain that is scanned whole is checked by resolve.
        """
        sizes, bad = self.plan.sizes[self.domain], self.bad
        seen = sum(map(self.reader.size, self.pieces[: self.piece]))
        seen += sum(min(self.reader.bytes_read(), self.reader.size(piece)) for piece in self.pieces[self.piece :][:1])
        for task, size in enumerate(sizes):
            if task != self.task and (summary := chunk_store.summary_of(self.folder, task)):
                records += summary["records"]
                bad += sum(summary["bad"].values())
                seen += size
        total = sum(sizes)
        if not 0 < seen < total:
            return
        if bad > self.corpus.max_bad * records * (1 + MARGIN * (total - seen) / seen):
            raise _TooManyBad(
                f"{bad} of the first {records} records are bad ({bad / records:.2%}), which the rest of the input "
                f"({1 - seen / total:.0%}) cannot make good"
            )

    def too_many_bad(self, counts: str) -> CorpusError:
        """The error of a domain that is stopped in the scan, with an example of each rule."""
        by_rule: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for chunk in self.chunks:
            by_rule.update(chunk["bad"])
            for rule, (piece, source, row, detail) in chunk["examples"].items():
                start = self.pieces[piece].start
                after = f" after the cut at {start}" if start else ""
                examples.setdefault(rule, f"{source}, row {row}{after}: {detail}")
        rules = {rule: f"{n} of task {self.task}, the first in {examples[rule]}" for rule, n in by_rule.items()}
        lines = rejects.lines(self.folder, self.task, starts=[0] * len(self.pieces))
        return rejects.too_many_bad(self.plan, self.domain, counts, rules=rules, examples=lines)

    @functools.cached_property
    def encode(self) -> Encoder:
        return self.load_encoder()

    def _decontaminate(self, chunk: chunk_store.Chunk) -> None:
        if not self.items:
            return
        documents = chunk.documents
        dropped = {
            i: Reject(
                rule="contaminated",
                source=documents["source"][i],
                row=documents["row"][i],
                detail=f"{hit.item}: {hit.ngram}",
                bad=False,
            )
            for i, hit in enumerate(self.items.hits(documents["text"]))
            if hit
        }
        if dropped:
            chunk.drop(dropped)

    def _commit(self, chunk: chunk_store.Chunk) -> None:
        self._decontaminate(chunk)
        index = len(self.chunks)
        self.chunks.append(chunk_store.commit(self.folder, self.task, index=index, chunk=chunk))
        self._write_bands(index, lambda: chunk.documents)

    def _write_bands(self, index: int, load: Callable[[], Any]) -> None:
        """Write the bands of a chunk, unless they are there; `load` gives the columns of its documents."""
        paths = band_paths(self.plan, self.domain, task=self.task)
        if not paths or paths[index].exists():
            return
        near, columns = self.corpus.near_duplicates, load()
        assert near is not None
        bands = self.signer.bands(columns["text"]) if self.signer else minhash.alone(columns["doc_id"], near.bands)
        chunk_store.write_bands(paths[index], bands)


def _signed_columns(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = chunk_store.documents(path).select(["text", "doc_id"]).to_pydict()
    return columns

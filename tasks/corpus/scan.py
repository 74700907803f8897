"""The first phase: a task's records are read, judged one by one, and the documents kept for the tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from tasks.corpus import contamination, filters, minhash, readers, spool, unchanged
from tasks.corpus import plan as plans
from tasks.corpus.encoder import Encoder
from tasks.corpus.plan import SOURCES, Plan
from tasks.corpus.progress import Meter
from tasks.corpus.records import CorpusError, Document, Record, Reject


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


def folder(work: Path, domain: str) -> Path:
    """Where the chunks of a domain lie."""
    return work / "scan" / domain


def scan(work: Path, plan: Plan, *, domain: str, task: int, meter: Meter, load_encoder: Callable[[], Encoder]) -> None:
    """Scan one task; goes on after the last committed chunk. Raises CorpusError or SourceError naming the domain."""
    try:
        _Scan(work, plan, domain=domain, task=task, load_encoder=load_encoder).run(meter)
    except CorpusError as error:
        raise CorpusError(f"domain {domain}: {error}") from error


def _open(work: Path, domain: str) -> readers.Reader:
    """The reader of a domain, whose digest the plan has checked; `work` names settings and sources."""
    corpus = plans.load(work).corpus
    return readers.open_reader(corpus.domains[domain], SOURCES, max_record_bytes=corpus.max_record_bytes, check=False)


class _Readers(threading.local):
    """The readers of a thread, since an open archive has one place; to list a source for each task would cost more."""

    def __init__(self) -> None:
        self.open = functools.lru_cache(maxsize=8)(_open)


_readers = _Readers()


class _Scan:
    def __init__(self, work: Path, plan: Plan, *, domain: str, task: int, load_encoder: Callable[[], Encoder]) -> None:
        corpus = plan.corpus
        self.corpus, self.task, self.load_encoder = corpus, task, load_encoder
        self.folder = folder(work, domain)
        self.pieces = plan.tasks[domain][task]
        self.reader = _readers.open(work.resolve(), domain)
        self.judge = filters.build(corpus.filters_of(domain))
        self.items = None
        if corpus.decontaminate:
            self.items = contamination.Items.load(corpus.decontaminate, SOURCES, versions=plan.sources)
        self.guard = functools.partial(
            unchanged.task,
            self.folder,
            task,
            part=corpus.domains[domain],
            name=f"domain {domain}",
            fetched=self.reader.fetched(self.pieces),
            versions=plan.sources,
        )
        near = corpus.near_duplicates_of(domain)
        self.signer = minhash.Signer(near.bands, near.rows, ngram=near.ngram, digits=near.digits) if near else None
        self.rows: list[int] = []
        self._piece = 0

    def run(self, meter: Meter) -> None:
        with self.guard():
            chunks = self._chunks(meter)
        spool.finish(self.folder, self.task, chunks=chunks, rows=self.rows)

    def _chunks(self, meter: Meter) -> list[dict[str, Any]]:
        chunks = spool.committed(self.folder, self.task)
        skip = sum(chunk["records"] for chunk in chunks)
        for done in chunks:
            meter.rules.update({**done["rules"], **done["bad"]})
            meter.add(documents=done["records"])
        chunk = spool.Chunk()
        for number, record in enumerate(self._records(meter)):
            if number < skip:
                continue
            self._take(record, number=number, chunk=chunk)
            if chunk.is_full:
                chunks.append(self._commit(chunk, index=len(chunks), meter=meter))
                chunk = spool.Chunk()
        if chunk.records:
            chunks.append(self._commit(chunk, index=len(chunks), meter=meter))
        return chunks

    def _records(self, meter: Meter) -> Iterator[Record]:
        for index, piece in enumerate(self.pieces):
            self._piece = index
            self.rows.append((yield from self.reader.read(piece)))
            meter.add(files=int(piece.start == 0))

    def _take(self, record: Record, *, number: int, chunk: spool.Chunk) -> None:
        if isinstance(record, Reject):
            chunk.reject(record, record=number, piece=self._piece)
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
        chunk.reject(reject, record=number, piece=self._piece, text=kept_text)

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

    def _decontaminate(self, chunk: spool.Chunk) -> None:
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

    def _commit(self, chunk: spool.Chunk, *, index: int, meter: Meter) -> dict[str, object]:
        self._decontaminate(chunk)
        bands = None
        if self.signer:
            bands = self.signer.bands(chunk.documents["text"])
        elif self.corpus.near_duplicates:
            bands = minhash.alone(chunk.documents["doc_id"], self.corpus.near_duplicates.bands)
        account = spool.commit(self.folder, self.task, index=index, chunk=chunk, bands=bands)
        meter.rules.update({**account["rules"], **account["bad"]})
        meter.add(documents=chunk.records, bytes=chunk.chars)
        return account

"""The tokenise phase: write the documents of a task to shards, and beside them which records were dropped and why.

Per task: `DOMAIN/{train,validation,test}/part-TTTTT-KKK.arrow` with sidecars; `verdicts/DOMAIN/task-TTTTT.arrow`, a
code per record in the order of reading (its split or the rule that dropped it), from which a broken shard is made
again; and `rejects/DOMAIN/task-TTTTT.jsonl`, dropped records that are worth a look.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import shards
from tasks.corpus.manifest import SPLITS
from tasks.corpus.prepare import chunk_store, rejects, resolve, scan
from tasks.corpus.prepare.planning import Plan
from tasks.corpus.prepare.resolve import OUTCOMES
from tasks.corpus.records import runs
from tasks.corpus.sampling import permutation
from tasks.corpus.tokenizer.encoder import Encoder

BATCH_BYTES = 1 << 21  # text given to the tokenizer at once: enough for every core, little enough for memory


@dataclass(frozen=True, kw_only=True)
class PartId:
    """Part `index` of what a task gives to a split; it becomes one shard."""

    domain: str
    split: str
    task: int
    index: int

    def path(self, corpus: Path) -> Path:
        """Its file in a corpus."""
        return corpus / self.domain / self.split / f"part-{self.task:05d}-{self.index:03d}.arrow"

    def order(self, seed: int, documents: int) -> NDArray[np.int64]:
        """The order of its documents, int64 [documents]."""
        round_keys = permutation.key(seed, self.domain, self.split, self.task, self.index)
        return permutation.shuffled(documents, round_keys=round_keys)

    def metadata(self, encode: Encoder, key: str) -> dict[str, str]:
        """Metadata of its schema. `task_key` is a hash of everything that the bytes depend on."""
        place = [key, self.domain, self.split, self.task, self.index]
        return {
            "format": shards.FORMAT,
            "tokenizer": encode.fingerprint,
            "eos_token_id": str(encode.eos_token_id),
            "domain": self.domain,
            "split": self.split,
            "task_key": hashlib.sha256(json.dumps(place).encode()).hexdigest(),
        }


def done_path(out: Path, domain: str, *, task: int) -> Path:
    """The record that says a task is tokenised."""
    return out / "done" / domain / f"{task:05d}.json"


def finished(out: Path, domain: str, *, task: int) -> dict[str, Any] | None:
    """A task's record, if all that it lists is there; None if there is work to do."""
    path = done_path(out, domain, task=task)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    corpus = out / "corpus"
    for sidecars in record["splits"].values():
        for sidecar in sidecars:
            if shards.committed(corpus / sidecar["path"], sidecar["task_key"]) != sidecar:
                return None
    return record if all((corpus / path).exists() for path in record["files"]) else None


def tokenise(plan: Plan, *, out: Path, domain: str, task: int, encode: Encoder) -> None:
    """Tokenise one task into `out`, except parts that are committed. Raises BackendMismatch."""
    began, sampled = time.perf_counter(), encode.checks["sampled"]
    job = _Task(plan, out=out, domain=domain, task=task, encode=encode)
    job.write_shards()
    record = {
        "splits": {split: writer.sidecars for split, writer in job.writers.items()},
        "files": job.write_records(),
        "encoded_tokens": job.encoded,
        "seconds": time.perf_counter() - began,
        "backend": encode.backend_name,
        "checks": {**encode.checks, "sampled": encode.checks["sampled"] - sampled},
    }
    scratch.write_json(done_path(out, domain, task=task), record)


class _Task:
    def __init__(self, plan: Plan, *, out: Path, domain: str, task: int, encode: Encoder) -> None:
        self.plan, self.domain, self.task, self.encode = plan, domain, task, encode
        self.corpus = out / "corpus"
        self.folder = scan.folder(plan, domain)
        self.chunks = chunk_store.chunk_paths(self.folder, task)
        self.outcomes, self.starts = resolve.outcomes_of(plan, domain, task=task)
        self.writers = {split: _SplitWriter(self, split) for split in SPLITS}
        self.encoded = 0

    def write_shards(self) -> None:
        for writer in self.writers.values():
            writer.look_up()
        start = 0
        for table in map(chunk_store.documents, self.chunks):
            outcomes = self.outcomes[start : start + len(table)]
            start += len(table)
            for split, writer in self.writers.items():
                rows = np.flatnonzero(outcomes == OUTCOMES.index(split))
                rows = rows[writer.skip_committed(len(rows)) :]
                self._encode(table.take(pa.array(rows)).combine_chunks(), writer)
        for writer in self.writers.values():
            writer.cut()

    def _encode(self, table: pa.Table, writer: _SplitWriter) -> None:
        sizes = pc.binary_length(table.column("text")).to_numpy().astype(np.int64)  # in UTF-8
        for begin, end in runs(sizes.tolist(), most=BATCH_BYTES):
            batch, mask = table.slice(begin, end - begin), None
            if batch.column("ids").null_count == len(batch):
                ids, offsets = self.encode.encode(batch.column("text").to_pylist())
            else:
                flat = batch.column("ids").combine_chunks()
                bare = np.split(flat.flatten().to_numpy(), flat.offsets.to_numpy()[1:-1])
                ids, offsets = self.encode.wrap(bare)
                if batch.column("loss_mask").null_count < len(batch):
                    mask = self.encode.wrap_masks(bare, batch.column("loss_mask").to_pylist())
            self.encoded += len(ids)
            writer.write(batch, ids, offsets=offsets, text_bytes=sizes[begin:end], loss_mask=mask)

    def write_records(self) -> dict[str, str]:
        """Write verdicts and rejects; returns their paths in the corpus and their sha256."""
        records = sum(chunk["records"] for chunk in chunk_store.chunk_summaries(self.folder, self.task))
        verdicts = np.zeros(records, dtype=np.uint16)
        codes = {outcome: code for code, outcome in enumerate(OUTCOMES)}
        start = 0
        for path in self.chunks:
            documents = chunk_store.documents(path).column("record").to_numpy()
            verdicts[documents] = self.outcomes[start : start + len(documents)]
            start += len(documents)
            for reject in chunk_store.rejects(path).select(["record", "rule", "bad"]).to_pylist():
                rule = f"bad: {reject['rule']}" if reject["bad"] else reject["rule"]
                verdicts[reject["record"]] = codes.setdefault(rule, len(codes))
        table = pa.table({"verdict": pa.DictionaryArray.from_arrays(pa.array(verdicts), pa.array(list(codes)))})
        table = table.replace_schema_metadata({"starts": json.dumps(self.starts)})  # rows at which its pieces begin
        verdict_file = f"verdicts/{self.domain}/task-{self.task:05d}.arrow"
        chunk_store.write_table(self.corpus / verdict_file, table)
        names = [verdict_file]
        lines = rejects.lines(self.folder, self.task, starts=self.starts)
        if first := next(lines, None):
            names.append(f"rejects/{self.domain}/task-{self.task:05d}.jsonl")
            rejects.write(self.corpus / names[-1], itertools.chain([first], lines))
        return {name: scratch.digest(self.corpus / name) for name in names}


class _SplitWriter:
    """Fills the parts of one split of a task, and writes each once it has `shard_tokens`."""

    def __init__(self, job: _Task, split: str) -> None:
        self.job = job
        self.sidecars: list[dict[str, Any]] = []
        self.id = PartId(domain=job.domain, split=split, task=job.task, index=0)
        self.part = shards.Part()
        self.skip = 0  # documents of a committed part still to be skipped

    def look_up(self) -> None:
        """Skip the documents of the part if it is committed."""
        if sidecar := shards.committed(self.id.path(self.job.corpus), self._metadata()["task_key"]):
            self.skip = sidecar["documents"]
            self.sidecars.append(sidecar)

    def skip_committed(self, documents: int) -> int:
        """How many of the next documents lie in committed parts."""
        skipped = 0
        while self.skip and skipped < documents:
            step = min(self.skip, documents - skipped)
            skipped += step
            self.skip -= step
            if not self.skip:
                self._next()
                self.look_up()
        return skipped

    def write(
        self,
        table: pa.Table,
        ids: NDArray[Any],
        *,
        offsets: NDArray[np.int64],
        text_bytes: NDArray[np.int64],
        loss_mask: NDArray[np.bool_] | None,
    ) -> None:
        """Add the documents of a table, whose ids are `ids[offsets[i]:offsets[i + 1]]`, the loss mask alike."""
        starts, limit, begin = np.array(self.job.starts, dtype=np.uint64), self.job.plan.corpus.shard_tokens, 0
        while begin < len(table):
            # Up to and including the document that fills the part.
            full = int(np.searchsorted(offsets, offsets[begin] + limit - self.part.tokens, side="left"))
            end = min(full, len(table))
            some = table.slice(begin, end - begin)
            self.part.append(
                ids[offsets[begin] : offsets[end]],
                offsets[begin : end + 1] - offsets[begin],
                doc_ids=shards.from_binary(some.column("doc_id").combine_chunks()),
                sources=some.column("source").to_pylist(),
                rows=some.column("row").to_numpy() + starts[some.column("piece").to_numpy()],
                text_bytes=int(text_bytes[begin:end].sum()),
                loss_mask=None if loss_mask is None else loss_mask[offsets[begin] : offsets[end]],
            )
            if self.part.tokens >= limit:
                self.cut()
            begin = end

    def cut(self) -> None:
        """Write the part, its documents shuffled, and begin the next; nothing if it is empty."""
        if not self.part.documents:
            return
        job = self.job
        order = self.id.order(job.plan.corpus.seed, self.part.documents)
        path, metadata = self.id.path(job.corpus), self._metadata()
        self.sidecars.append(shards.write(path, self.part, order=order, dtype=job.encode.dtype, metadata=metadata))
        self.part = shards.Part()
        self._next()

    def _next(self) -> None:
        self.id = dataclasses.replace(self.id, index=self.id.index + 1)

    def _metadata(self) -> dict[str, str]:
        return self.id.metadata(self.job.encode, self.job.plan.keys.shards)

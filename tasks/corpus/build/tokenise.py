"""The third phase: a task's documents become shards; what was dropped, and why, is written beside them.

Per task: `DOMAIN/{train,validation,test}/part-TTTTT-KKK.arrow` with sidecars; `verdicts/DOMAIN/task-TTTTT.arrow`, a
code per record read, in order (its split or the rule that dropped it), which is what a broken shard is re-made from;
and `rejects/DOMAIN/task-TTTTT.jsonl`, dropped records that are worth a look.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import files, shards
from tasks.corpus.build import chunk_store, rejects, resolve, scan
from tasks.corpus.build.counters import Meter
from tasks.corpus.build.planning import Plan
from tasks.corpus.sampling import permutation
from tasks.corpus.tokenizer.encoder import Encoder

BATCH_BYTES = 1 << 21  # text given to the tokenizer at once: enough for every core, little enough for memory


def part_path(corpus: Path, domain: str, *, split: str, task: int, index: int) -> Path:
    """Where a part lies."""
    return corpus / domain / split / f"part-{task:05d}-{index:03d}.arrow"


def part_order(seed: int, domain: str, *, split: str, task: int, index: int, documents: int) -> NDArray[np.int64]:
    """Order of the documents of part `index` of a task, int64 [documents]."""
    return permutation.shuffled(documents, round_keys=permutation.key(seed, domain, split, task, index))


def part_metadata(encode: Encoder, key: str, *, domain: str, split: str, task: int, index: int) -> dict[str, str]:
    """Schema metadata of a part. Its `task_key` names everything that the bytes depend on."""
    task_key = hashlib.sha256(json.dumps([key, domain, split, task, index]).encode()).hexdigest()
    return {
        "format": shards.FORMAT,
        "tokenizer": encode.fingerprint,
        "eos_token_id": str(encode.eos_token_id),
        "domain": domain,
        "split": split,
        "task_key": task_key,
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


def tokenise(plan: Plan, *, out: Path, domain: str, task: int, encode: Encoder, meter: Meter) -> None:
    """Tokenise one task into `out`; parts that are committed are passed over. Raises BackendMismatch."""
    began, sampled = time.perf_counter(), encode.checks["sampled"]
    job = _Task(plan, out=out, domain=domain, task=task, encode=encode, meter=meter)
    job.run()
    record = {
        "splits": job.sidecars,
        "files": job.write_records(),
        "encoded_tokens": job.encoded,
        "seconds": time.perf_counter() - began,
        "backend": encode.backend_name,
        "checks": {**encode.checks, "sampled": encode.checks["sampled"] - sampled},
    }
    scratch.write_json(done_path(out, domain, task=task), record)


@dataclass
class _Filling:
    """The part of a split that is being filled; `skip` counts documents of a committed one still to pass over."""

    index: int = 0
    skip: int = 0
    part: shards.Part = field(default_factory=shards.Part)


class _Task:
    def __init__(self, plan: Plan, *, out: Path, domain: str, task: int, encode: Encoder, meter: Meter) -> None:
        self.plan, self.domain, self.task, self.encode, self.meter = plan, domain, task, encode, meter
        self.corpus = out / "corpus"
        self.folder = scan.folder(plan, domain)
        account = chunk_store.account(self.folder, task)
        assert account is not None
        self.account = account
        self.fate, self.starts = resolve.fate_of(plan, domain, task=task)
        self.sidecars: dict[str, list[dict[str, Any]]] = {split: [] for split in resolve.SPLITS}
        self.filling: dict[str, _Filling] = {split: _Filling() for split in resolve.SPLITS}
        self.encoded = 0

    def run(self) -> None:
        dropped = zip(resolve.FATES, np.bincount(self.fate, minlength=len(resolve.FATES)).tolist(), strict=True)
        self.meter.rules.update({rule: n for rule, n in dropped if n and rule not in resolve.SPLITS})
        for split in resolve.SPLITS:
            self._look_up(split)
        start = 0
        for table in chunk_store.batches(self.folder, self.task, chunks=self.account["chunks"]):
            fate = self.fate[start : start + len(table)]
            start += len(table)
            self._chunk(table, fate)
        for split in resolve.SPLITS:
            self._cut(split)

    def _chunk(self, table: pa.Table, fate: NDArray[np.uint8]) -> None:
        for split in resolve.SPLITS:
            mine = np.flatnonzero(fate == resolve.FATES.index(split))
            mine = mine[self._pass_over(split, len(mine)) :]
            chosen = table.take(pa.array(mine)).combine_chunks()
            sizes = _text_bytes(chosen)
            for begin, end in _cuts(sizes, BATCH_BYTES):
                self._encode(split, chosen.slice(begin, end - begin), sizes[begin:end])

    def _encode(self, split: str, table: pa.Table, text_bytes: NDArray[np.int64]) -> None:
        if table.column("ids").null_count == len(table):
            ids, offsets = self.encode.encode(table.column("text").to_pylist())
        else:
            flat = table.column("ids").combine_chunks()
            ids, offsets = self.encode.wrap(np.split(flat.flatten().to_numpy(), flat.offsets.to_numpy()[1:-1]))
        self.encoded += len(ids)
        self.meter.add(documents=len(table), tokens=len(ids), bytes=int(text_bytes.sum()))
        limit, begin = self.plan.corpus.shard_tokens, 0
        while begin < len(table):
            part = self.filling[split].part
            # Up to and with the document that fills the part.
            full = int(np.searchsorted(offsets, offsets[begin] + limit - part.tokens, side="left"))
            end = min(full, len(table))
            self._append(
                part,
                ids,
                offsets=offsets[begin : end + 1],
                table=table.slice(begin, end - begin),
                text_bytes=int(text_bytes[begin:end].sum()),
            )
            if part.tokens >= limit:
                self._cut(split)
            begin = end

    def _append(
        self, part: shards.Part, ids: NDArray[Any], *, offsets: NDArray[np.int64], table: pa.Table, text_bytes: int
    ) -> None:
        starts = np.array(self.starts, dtype=np.uint64)
        part.append(
            ids[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            doc_ids=_fixed_bytes(table.column("doc_id"), 16),
            sources=table.column("source").to_pylist(),
            rows=table.column("row").to_numpy() + starts[table.column("piece").to_numpy()],
            text_bytes=text_bytes,
        )

    def _look_up(self, split: str) -> None:
        """See whether the part to fill is committed: then its documents aren't tokenised again."""
        filling = self.filling[split]
        path = self._path(split, filling.index)
        key = self._metadata(split, filling.index)["task_key"]
        if sidecar := shards.committed(path, key):
            filling.skip = sidecar["documents"]
            self.sidecars[split].append(sidecar)
            self.meter.add(documents=sidecar["documents"], tokens=sidecar["tokens"])

    def _pass_over(self, split: str, documents: int) -> int:
        """How many of the next documents lie in committed parts."""
        passed = 0
        filling = self.filling[split]
        while filling.skip and passed < documents:
            step = min(filling.skip, documents - passed)
            passed += step
            filling.skip -= step
            if not filling.skip:
                filling.index += 1
                self._look_up(split)
        return passed

    def _cut(self, split: str) -> None:
        """Write the part that was filled, its documents shuffled, and begin the next."""
        filling, corpus = self.filling[split], self.plan.corpus
        part = filling.part
        if not part.documents:
            return
        order = part_order(
            corpus.seed,
            self.domain,
            split=split,
            task=self.task,
            index=filling.index,
            documents=part.documents,
        )
        metadata = self._metadata(split, filling.index)
        path = self._path(split, filling.index)
        self.sidecars[split].append(shards.write(path, part, order=order, dtype=self.encode.dtype, metadata=metadata))
        self.filling[split] = _Filling(index=filling.index + 1)

    def _path(self, split: str, index: int) -> Path:
        return part_path(self.corpus, self.domain, split=split, task=self.task, index=index)

    def _metadata(self, split: str, index: int) -> dict[str, str]:
        key = self.plan.keys.shards
        return part_metadata(self.encode, key, domain=self.domain, split=split, task=self.task, index=index)

    def write_records(self) -> dict[str, str]:
        """Write verdicts and rejects; returns their paths in the corpus and their sha256."""
        verdicts = np.zeros(self.account["records"], dtype=np.uint16)
        codes = {fate: code for code, fate in enumerate(resolve.FATES)}
        start = 0
        for path in chunk_store.chunk_paths(self.folder, self.task, chunks=self.account["chunks"]):
            documents = chunk_store.documents(path).column("record").to_numpy()
            verdicts[documents] = self.fate[start : start + len(documents)]
            start += len(documents)
            dropped = chunk_store.rejects(path).select(["record", "rule", "bad"])
            for reject in dropped.to_pylist():
                rule = f"bad: {reject['rule']}" if reject["bad"] else reject["rule"]
                verdicts[reject["record"]] = codes.setdefault(rule, len(codes))
        found = {}
        table = pa.table({"verdict": pa.DictionaryArray.from_arrays(pa.array(verdicts), pa.array(list(codes)))})
        table = table.replace_schema_metadata({"starts": json.dumps(self.starts)})  # rows at which its pieces begin
        verdict_path = f"verdicts/{self.domain}/task-{self.task:05d}.arrow"
        found[verdict_path] = self._write(verdict_path, _arrow_file(table))
        shown = rejects.lines(self.folder, self.task, chunks=self.account["chunks"], starts=self.starts)
        if first := next(shown, None):
            reject_path = f"rejects/{self.domain}/task-{self.task:05d}.jsonl"
            found[reject_path] = self._write(reject_path, itertools.chain([first], shown))
        return found

    def _write(self, name: str, content: Iterable[bytes | memoryview]) -> str:
        path = self.corpus / name
        with files.replacing(path) as file:
            for block in content:
                file.write(block)
        return scratch.digest(path)


def _arrow_file(table: pa.Table) -> list[memoryview]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return [memoryview(sink.getvalue())]


def _text_bytes(table: pa.Table) -> NDArray[np.int64]:
    """UTF-8 bytes of each text, int64 [documents]."""
    import pyarrow.compute as pc

    return pc.binary_length(table.column("text")).to_numpy().astype(np.int64)


def _cuts(sizes: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Runs of documents of about `limit` bytes."""
    ends, begin = np.cumsum(sizes), 0
    while begin < len(sizes):
        done = int(ends[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(ends, done + limit, side="left")) + 1, begin + 1)
        yield begin, min(end, len(sizes))
        begin = end


def _fixed_bytes(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """A fixed-size binary column as uint8 [rows, width]."""
    array = column.combine_chunks()
    raw = np.frombuffer(array.buffers()[1], dtype=np.uint8).reshape(-1, width)
    return raw[array.offset : array.offset + len(array)]

"""Make broken shards and sidecars of a corpus again, byte for byte, for `moeforge repair`.

The verdicts of a task say which records of its source belong to a shard. A new shard is used only if its sha256 is the
manifest's. Files are replaced, never written in place: they may be links into DVC's cache, which is then broken too.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks import scratch, settings
from tasks.corpus import files, manifest, shards
from tasks.corpus.prepare import planning, scan, stage, tokenise
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import CorpusError, Document, Record
from tasks.corpus.tokenizer import encoder
from tasks.corpus.tokenizer.encoder import Encoder
from tasks.tools import verify_corpus as verify

LINKED = "; it was a link into a cache, whose file has the same flaw: `dvc commit` stores the repaired one"


def repair(corpus_dir: Path, *, report: Callable[[str], None] = print) -> list[str]:
    """Repair a corpus; returns the problems that are left, each with its fix.

    Deletes what killed writers left, writes sidecars again from the manifest, and makes broken shards again. Other
    unlisted files are only named. `report` gets a line for each repair.

    Raises:
        BusyError: the corpus is being corpus.
    """
    problems = list(verify.problems(corpus_dir))
    if any(problem.kind == "manifest" for problem in problems):
        fix = f"nothing was changed. `dvc checkout --force {corpus_dir}` brings it back, or run the stage again"
        return [f"{problem}; {fix}" for problem in problems if problem.kind == "manifest"]
    with scratch.workspace("corpus", corpus_dir.resolve().name, inputs="repair", shared=True) as work:
        work.rmdir()  # only the lock is wanted: the stage must not run meanwhile
        return list(_repair(corpus_dir, problems, report=report))


def _repair(corpus_dir: Path, problems: list[verify.Problem], *, report: Callable[[str], None]) -> Iterator[str]:
    """Repair what can be repaired; yields the problems that are left."""
    corpus = manifest.load(corpus_dir)
    stage_command = f"`python -m tasks.corpus {corpus.corpus}`"
    note = {problem.path: LINKED for problem in problems if _is_link(problem.path)}
    for problem in problems:
        if problem.kind == "unlisted" and files.TMP in problem.path.name:
            problem.path.unlink(missing_ok=True)
            report(f"{problem.path}: deleted; a writer that was killed left it")
        elif problem.kind == "unlisted":
            yield f"{problem}; delete it if nobody needs it"
        elif problem.kind == "sidecar" and problem.shard:
            shards.write_sidecar(corpus_dir / problem.shard.path, dataclasses.asdict(problem.shard))
            report(f"{problem.path}: written again from the manifest{note.get(problem.path, '')}")
        elif problem.kind != "shard":
            yield f"{problem}; only the stage can fix it: {stage_command}"
    broken: dict[tuple[str, int], list[manifest.Shard]] = {}
    for problem in problems:
        if problem.kind == "shard" and (shard := problem.shard):
            mine = broken.setdefault((Path(shard.path).parts[0], verify.number_of(shard)[0]), [])
            mine += [] if shard in mine else [shard]
    unread = {problem.path for problem in problems if problem.kind == "records"}
    for (domain, task), mine in broken.items():
        left = {shard.path for shard in mine}
        try:
            for path in _remake(corpus_dir, corpus, domain=domain, task=task, broken=mine, unread=unread):
                report(f"{corpus_dir / path}: made again{note.get(corpus_dir / path, '')}")
                left.remove(path)
        except stage.FAILURES as error:
            for path in sorted(left):
                yield f"{corpus_dir / path}: cannot be made again ({error}); run the stage again: {stage_command}"


def _is_link(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and path.stat().st_nlink > 1)


@dataclass
class _BrokenShard:
    """A shard to make again: documents `begin` to `end` of those that its task gave to its split."""

    shard: manifest.Shard
    begin: int
    end: int
    part: shards.Part = field(default_factory=shards.Part)
    waiting: list[tuple[Document, int]] = field(default_factory=list)

    @property
    def split(self) -> str:
        return Path(self.shard.path).parts[1]

    def add(self, document: Document, row: int, *, encode: Encoder) -> None:
        self.waiting.append((document, row))
        documents = self.part.documents + len(self.waiting)
        if documents == self.end - self.begin or sum(len(d.text) for d, _ in self.waiting) > tokenise.BATCH_BYTES:
            self._encode(encode)

    def _encode(self, encode: Encoder) -> None:
        documents = [document for document, _ in self.waiting]
        texts = [document.text for document in documents]
        ids = [document.ids for document in documents if document.ids is not None]
        flat, offsets = encode.wrap(ids) if ids else encode.encode(texts)
        masks = [document.loss_mask for document in documents]
        is_masked = any(mask is not None for mask in masks)
        self.part.append(
            flat,
            offsets,
            doc_ids=np.frombuffer(b"".join(map(scan.doc_id, texts)), dtype=np.uint8).reshape(-1, 16),
            sources=[document.source for document in documents],
            rows=np.array([row for _, row in self.waiting], dtype=np.uint64),
            text_bytes=sum(len(text.encode()) for text in texts),
            loss_mask=encode.wrap_masks(ids, masks) if is_masked else None,
        )
        self.waiting = []


def _remake(
    corpus_dir: Path,
    corpus: manifest.Manifest,
    *,
    domain: str,
    task: int,
    broken: list[manifest.Shard],
    unread: set[Path],
) -> Iterator[str]:
    """Make shards of one task again; yields the path of each once it is in its place. Raises stage.FAILURES."""
    encode = encoder.load_encoder(stage.MODELS / corpus.model, separators=corpus.separators)
    if not encoder.same_ids(encode.fingerprint, corpus.tokenizer):
        raise CorpusError(
            f"{stage.MODELS / corpus.model}: its tokenizer is {encode.fingerprint}, not {corpus.tokenizer}"
        )
    entry = settings.load().corpus(corpus.corpus)
    path = corpus_dir / "verdicts" / domain / f"task-{task:05d}.arrow"
    if path in unread:
        raise CorpusError(f"it needs {path}, which is broken too")
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    verdicts, starts = table.column("verdict").combine_chunks(), json.loads(table.schema.metadata[b"starts"])
    codes, names = verdicts.indices.to_numpy(), verdicts.dictionary.to_pylist()
    remaking = list(_broken_shards(corpus, domain=domain, task=task, broken=broken))
    seen: Counter[str] = Counter()
    number = 0
    for number, (record, row) in enumerate(_records(entry, domain=domain, task=task, starts=starts), start=1):
        if number > len(codes):
            break
        split = names[codes[number - 1]]
        for shard in remaking:
            if split != shard.split or not shard.begin <= seen[split] < shard.end:
                continue
            if not isinstance(record, Document):
                raise CorpusError(f"{record.source}, row {row}: {record.rule}, but it was a document; it changed")
            shard.add(scan.decoded(record, encode), row, encode=encode)
            if seen[split] == shard.end - 1:
                _replace(corpus_dir, corpus, shard, encode=encode)
                yield shard.shard.path
                shard.part = shards.Part()
        seen[split] += 1
    if number != len(codes):
        raise CorpusError(f"the source has other records than the {len(codes)} from which it was made")


def _broken_shards(
    corpus: manifest.Manifest, *, domain: str, task: int, broken: list[manifest.Shard]
) -> Iterator[_BrokenShard]:
    for part in corpus.domains[domain].splits.values():
        begin = 0
        for shard in part.shards:
            if verify.number_of(shard)[0] == task:
                if shard in broken:
                    yield _BrokenShard(shard, begin, begin + shard.documents)
                begin += shard.documents


def _records(entry: settings.Corpus, *, domain: str, task: int, starts: list[int]) -> Iterator[tuple[Record, int]]:
    """The records of a task, and the row of each in its file."""
    reader = open_reader(entry.domains[domain], planning.SOURCES, max_record_bytes=entry.max_record_bytes)
    tasks = reader.tasks(task_bytes=entry.task_bytes)
    if task >= len(tasks):
        raise CorpusError(f"the source gives {len(tasks)} tasks, there is no task {task} any more")
    if len(tasks[task]) != len(starts):
        raise CorpusError(f"the source gives task {task} {len(tasks[task])} pieces, and it had {len(starts)}")
    for piece, start in zip(tasks[task], starts, strict=True):
        for record in reader.read(piece):
            yield record, start + record.row


def _replace(corpus_dir: Path, corpus: manifest.Manifest, broken: _BrokenShard, *, encode: Encoder) -> None:
    """Write a shard and put it in its place, if it is what the manifest lists."""
    shard, (domain, split, _) = broken.shard, Path(broken.shard.path).parts
    task, index = verify.number_of(shard)
    part = tokenise.PartId(domain=domain, split=split, task=task, index=index)
    order, metadata = part.order(corpus.seed, broken.part.documents), part.metadata(encode, "")
    batch = broken.part.batch(order, dtype=encode.dtype, metadata={**metadata, "task_key": shard.task_key})
    with files.replacing(corpus_dir / shard.path) as file:
        sha256 = shards.write_batch(file, batch).sha256.hexdigest()
        if sha256 != shard.sha256:
            raise CorpusError(
                f"made again, its sha256 is {sha256}, and not {shard.sha256}: source, settings or code changed"
            )

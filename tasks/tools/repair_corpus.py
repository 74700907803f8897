"""Mend a corpus: make broken shards and sidecars again, byte for byte, without making the rest of it.

    python -m tasks.tools.repair_corpus data/corpora/NAME

A shard is read again from its source, by its task's verdicts; it takes its place only if its sha256 is the manifest's.
Files are replaced, never written in place: they may be links into DVC's cache, which has the same flaw then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks import scratch, settings
from tasks.corpus import files, manifest, shards
from tasks.corpus.build import planning, scan, stage, tokenise
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import CorpusError, Document, Record
from tasks.corpus.tokenizer import encoder
from tasks.corpus.tokenizer.encoder import Encoder
from tasks.tools import verify_corpus as verify

LINKED = "; it was a link into a cache, whose file has the same flaw: `dvc commit` stores the mended one"


def repair(corpus_dir: Path, *, say: Callable[[str], None] = print) -> list[str]:
    """Mend a corpus; returns what is wrong still, a line each with the mend; empty if it is whole.

    Deletes what killed writers left, writes sidecars again from the manifest, and makes broken shards again. Other
    foreign files are only named. `say` is told what was done.

    Raises:
        BusyError: the corpus is being made.
    """
    found = list(verify.problems(corpus_dir))
    if any(problem.kind == "manifest" for problem in found):
        mend = f"nothing was changed. `dvc checkout --force {corpus_dir}` brings it back, or run the stage again"
        return [f"{problem}; {mend}" for problem in found if problem.kind == "manifest"]
    with scratch.workspace("corpus", corpus_dir.resolve().name, inputs="repair", shared=True) as work:
        work.rmdir()  # all that is wanted is that nobody makes the corpus meanwhile
        return list(_mend(corpus_dir, found, say=say))


def _mend(corpus_dir: Path, found: list[verify.Problem], *, say: Callable[[str], None]) -> Iterator[str]:
    """Mend what can be; yields what is wrong still."""
    made = manifest.load(corpus_dir)
    again = f"`python -m tasks.corpus {made.corpus}`"
    note = {problem.path: LINKED for problem in found if _is_link(problem.path)}
    for problem in found:
        if problem.kind == "foreign" and files.TMP in problem.path.name:
            problem.path.unlink(missing_ok=True)
            say(f"{problem.path}: deleted; a writer that was killed left it")
        elif problem.kind == "foreign":
            yield f"{problem}; delete it if nobody misses it"
        elif problem.kind == "sidecar" and problem.shard:
            shards.write_sidecar(corpus_dir / problem.shard.path, dataclasses.asdict(problem.shard))
            say(f"{problem.path}: written again from the manifest{note.get(problem.path, '')}")
        elif problem.kind != "shard":
            yield f"{problem}; only the stage can mend it: {again}"
    broken = {problem.shard.path: problem.shard for problem in found if problem.kind == "shard" and problem.shard}
    unread = {problem.path for problem in found if problem.kind == "records"}
    for (domain, task), mine in _by_task(broken.values()).items():
        left = {shard.path for shard in mine}
        try:
            for path in _remake(corpus_dir, made, domain=domain, task=task, broken=mine, unread=unread):
                say(f"{corpus_dir / path}: made again{note.get(corpus_dir / path, '')}")
                left.remove(path)
        except stage.FAILURES as error:
            for path in sorted(left):
                yield f"{corpus_dir / path}: cannot be made again ({error}); run the stage again: {again}"


def _is_link(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and path.stat().st_nlink > 1)


def _by_task(broken: Iterable[manifest.Shard]) -> dict[tuple[str, int], list[manifest.Shard]]:
    found: dict[tuple[str, int], list[manifest.Shard]] = {}
    for shard in broken:
        found.setdefault((Path(shard.path).parts[0], verify.number_of(shard)[0]), []).append(shard)
    return found


@dataclass
class _Lost:
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
        self.part.append(
            flat,
            offsets,
            doc_ids=np.frombuffer(b"".join(map(scan.doc_id, texts)), dtype=np.uint8).reshape(-1, 16),
            sources=[document.source for document in documents],
            rows=np.array([row for _, row in self.waiting], dtype=np.uint64),
            text_bytes=sum(len(text.encode()) for text in texts),
        )
        self.waiting = []


def _remake(
    corpus_dir: Path,
    made: manifest.Manifest,
    *,
    domain: str,
    task: int,
    broken: list[manifest.Shard],
    unread: set[Path],
) -> Iterator[str]:
    """Make shards of one task again; yields the path of each once it is in its place. Raises stage.FAILURES."""
    encode = encoder.load_encoder(stage.MODELS / made.model, separators=made.separators)
    if not encoder.same_ids(encode.fingerprint, made.tokenizer):
        raise CorpusError(f"{stage.MODELS / made.model}: its tokenizer is {encode.fingerprint}, not {made.tokenizer}")
    corpus = settings.load().corpus(made.corpus)
    path = corpus_dir / "verdicts" / domain / f"task-{task:05d}.arrow"
    if path in unread:
        raise CorpusError(f"it needs {path}, which is broken too")
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    verdicts, starts = table.column("verdict").combine_chunks(), json.loads(table.schema.metadata[b"starts"])
    codes, names = verdicts.indices.to_numpy(), verdicts.dictionary.to_pylist()
    lost = list(_lost(made, domain=domain, task=task, broken=broken))
    seen: Counter[str] = Counter()
    number = 0
    for number, (record, row) in enumerate(_records(corpus, domain=domain, task=task, starts=starts), start=1):
        if number > len(codes):
            break
        split = names[codes[number - 1]]
        for shard in lost:
            if split != shard.split or not shard.begin <= seen[split] < shard.end:
                continue
            if not isinstance(record, Document):
                raise CorpusError(f"{record.source}, row {row}: {record.rule}, but it was a document; it changed")
            shard.add(scan.decoded(record, encode), row, encode=encode)
            if seen[split] == shard.end - 1:
                _replace(corpus_dir, made, shard, encode=encode)
                yield shard.shard.path
                shard.part = shards.Part()
        seen[split] += 1
    if number != len(codes):
        raise CorpusError(f"the source has other records than the {len(codes)} from which it was made")


def _lost(made: manifest.Manifest, *, domain: str, task: int, broken: list[manifest.Shard]) -> Iterator[_Lost]:
    for part in made.domains[domain].splits.values():
        begin = 0
        for shard in part.shards:
            if verify.number_of(shard)[0] == task:
                if shard in broken:
                    yield _Lost(shard, begin, begin + shard.documents)
                begin += shard.documents


def _records(corpus: settings.Corpus, *, domain: str, task: int, starts: list[int]) -> Iterator[tuple[Record, int]]:
    """The records of a task, and the row of each in its file."""
    reader = open_reader(corpus.domains[domain], planning.SOURCES, max_record_bytes=corpus.max_record_bytes)
    tasks = reader.tasks(task_bytes=corpus.task_bytes)
    if task >= len(tasks):
        raise CorpusError(f"the source gives {len(tasks)} tasks, there is no task {task} any more")
    if len(tasks[task]) != len(starts):
        raise CorpusError(f"the source gives task {task} {len(tasks[task])} pieces, and it had {len(starts)}")
    for piece, start in zip(tasks[task], starts, strict=True):
        for record in reader.read(piece):
            yield record, start + record.row


def _replace(corpus_dir: Path, made: manifest.Manifest, lost: _Lost, *, encode: Encoder) -> None:
    """Write a shard and put it in its place, if it is what the manifest lists."""
    shard, (domain, split, _) = lost.shard, Path(lost.shard.path).parts
    task, index = verify.number_of(shard)
    part = tokenise.PartId(domain=domain, split=split, task=task, index=index)
    order, metadata = part.order(made.seed, lost.part.documents), part.metadata(encode, "")
    batch = lost.part.batch(order, dtype=encode.dtype, metadata={**metadata, "task_key": shard.task_key})
    with files.replacing(corpus_dir / shard.path) as file:
        sha256 = shards.write_batch(file, batch).sha256.hexdigest()
        if sha256 != shard.sha256:
            raise CorpusError(
                f"made again, its sha256 is {sha256}, and not {shard.sha256}: source, settings or code changed"
            )


def main() -> int:
    """Mend the corpus named on the command line; 1 if something is wrong still."""
    parser = argparse.ArgumentParser(prog="python -m tasks.tools.repair_corpus", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="a corpus directory, such as data/corpora/demo")
    corpus = parser.parse_args().corpus
    try:
        left = repair(corpus)
    except scratch.BusyError as error:
        left = [str(error)]
    for problem in left:
        print(problem, file=sys.stderr)
    if not left:
        print(f"{corpus}: whole")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())

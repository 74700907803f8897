"""Makes multiple choice of word2vec's questions-words.txt: four words a line, and lines that begin kinds of them."""

from __future__ import annotations

import random
from typing import Any

SEED = 0
WORDS = ("first", "second", "third", "fourth")
CHOICES = 4


def process_docs(dataset: Any) -> Any:
    """Items {first, second, third, choices, gold} of a data set of lines, shuffled so that a limit takes all kinds.

    The wrong choices are answers to other items of the same kind, words of the question left out.
    """
    from datasets import Dataset

    kinds: list[list[list[str]]] = []
    for text in dataset["text"]:
        if text.startswith(":"):
            kinds.append([])
        elif text.strip():
            kinds[-1].append(text.split())
    generator = random.Random(SEED)
    items = [item for kind in kinds for item in _items(kind, generator)]
    generator.shuffle(items)
    return Dataset.from_list(items)


def _items(kind: list[list[str]], generator: random.Random) -> list[dict[str, Any]]:
    answers = sorted({words[-1] for words in kind})
    items = []
    for words in kind:
        wrong = generator.sample([word for word in answers if word not in words], CHOICES - 1)
        gold = generator.randrange(CHOICES)
        choices = [*wrong[:gold], words[-1], *wrong[gold:]]
        items.append(dict(zip(WORDS[:3], words[:3], strict=True)) | {"choices": choices, "gold": gold})
    return items

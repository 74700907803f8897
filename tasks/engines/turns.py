"""Speed of several models that take turns on the same text, whatever engine runs them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, TypeVar

Name = TypeVar("Name", bound=Hashable)
SHORT = 16
"""Tokens that are read before decoding is measured."""


class Reader(Protocol):
    """A model in memory with a cache of what it has read."""

    def restart(self) -> None:
        """Empty the cache."""

    def read(self, ids: Sequence[int]) -> int:
        """Read the next tokens, and return the id that is likeliest after them."""


@dataclass(frozen=True)
class Text:
    """What every model reads."""

    ids: list[int]
    _: KW_ONLY
    prompt: int = 512
    """Tokens that are read at once; fewer where the text is shorter."""
    new: int = 32
    """Tokens that are read one by one, as in decoding. They are those of the text and not the model's own, so that all
    models read the same and none ends early; the likeliest token is still looked for."""
    repeats: int = 3
    seconds: float = 40
    """No further repeat begins after that time."""

    def __post_init__(self) -> None:
        """Raises ValueError if the text is too short to decode anything."""
        if len(self.ids) <= SHORT:
            raise ValueError(f"a text of {len(self.ids)} tokens is too short to measure speed by; give {SHORT + 1}")
        object.__setattr__(self, "prompt", min(self.prompt, len(self.ids)))
        object.__setattr__(self, "new", min(self.new, len(self.ids) - SHORT))

    @property
    def length(self) -> int:
        """Tokens that a model's cache must hold."""
        return max(self.prompt, SHORT + self.new)


def take(
    readers: Mapping[Name, Reader], text: Text, *, begins: Callable[[Name], None] = lambda _: None
) -> dict[Name, dict[str, list[float]]]:
    """Measure the models A B C A B C …, so that figures of one repeat are of the same minute.

    Args:
        readers: by name.
        text: what they read.
        begins: called with a name before that model runs.

    Returns:
        By name: prompt, in tokens/s of reading `text.prompt` tokens, up to the choice of the next one; and decode,
        1 / the median time of a token; each by repeat. Every model has read a short text before.
    """
    begun = time.perf_counter()
    rates: dict[Name, dict[str, list[float]]] = {name: {"prompt": [], "decode": []} for name in readers}
    for repeat in range(text.repeats + 1):
        if repeat > 1 and time.perf_counter() - begun > text.seconds:
            break
        for name, reader in readers.items():
            begins(name)
            if repeat:
                prompt, decode = _once(reader, text)
                rates[name]["prompt"].append(prompt)
                rates[name]["decode"].append(decode)
            else:
                _once(reader, Text(text.ids, prompt=SHORT, new=2))
    return rates


def _once(reader: Reader, text: Text) -> tuple[float, float]:
    reader.restart()
    begun = time.perf_counter()
    reader.read(text.ids[: text.prompt])
    prompt = text.prompt / (time.perf_counter() - begun)
    reader.restart()
    reader.read(text.ids[:SHORT])
    seconds = []
    for token in text.ids[SHORT : SHORT + text.new]:
        begun = time.perf_counter()
        reader.read([token])
        seconds.append(time.perf_counter() - begun)
    return prompt, 1 / statistics.median(seconds)

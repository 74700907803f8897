"""What readers give: documents, and records that are none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


class CorpusError(ValueError):
    """A corpus that cannot be made from what was found; the message names the domain and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and where it came from: `row` is the line, row or page in the file `source`, counted from 0.

    `ids` are its tokens, if it comes tokenised; the scan decodes them, and `text` may be empty.
    `loss_mask` bool [len(ids)] is False at tokens that are no targets of training; without it, all are.
    """

    text: str
    source: str
    row: int
    ids: NDArray[Any] | None = None
    loss_mask: NDArray[Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that gave no document. `bad` ones are faults of the file; the others (a redirect) belong there."""

    rule: str
    source: str
    row: int
    detail: str = ""
    bad: bool = True


Record = Document | Reject
NUL_RULE = "NUL characters"


def runs(sizes: Iterable[int], *, most: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive items, (first, end) each, of `most` together; a larger item is a run of its own."""
    first = end = total = 0
    for end, size in enumerate(sizes, start=1):
        if total + size > most and end - 1 > first:
            yield first, end - 1
            first, total = end - 1, 0
        total += size
    if first < end:
        yield first, end


def nul_fault(text: str) -> str:
    """What NULs in a text say, if it has any; empty otherwise. UTF-16 and UTF-32 read as UTF-8 are full of them."""
    count = text.count("\0")
    if not count:
        return ""
    return f"{count} of {len(text)} characters are NUL, the first at {text.index(chr(0))}; UTF-16 or UTF-32, perhaps"


def stray_nul_fault(text: str) -> str:
    """`nul_fault` for a string that was written with its NULs: one alone, or one in a hundred characters, may stay."""
    count = text.count("\0")
    return nul_fault(text) if count > 1 and count * 100 > len(text) else ""

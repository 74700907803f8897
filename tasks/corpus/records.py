"""What readers give: documents, and records that are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


class CorpusError(ValueError):
    """A corpus that cannot be made from what was found; the message names the domain and the mend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and where it came from: `row` is the line, row or page in the file `source`, counted from 0.

    `ids` are its tokens, without separators, if it comes tokenised (Megatron).
    """

    text: str
    source: str
    row: int
    ids: NDArray[Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that gave no document. `bad` ones are faults of the file; the others (a redirect) belong there."""

    rule: str
    source: str
    row: int
    detail: str = ""
    bad: bool = True


Record = Document | Reject

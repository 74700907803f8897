"""What readers give: documents, and the tally of the records that were none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class CorpusError(ValueError):
    """A corpus that cannot be made from what was found; the message names the domain and the mend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text and where it came from: `row` is the line, row or page in the file `source`, counted from 0."""

    text: str
    source: str
    row: int


@dataclass
class Tally:
    """Records per rule, and the first example of each kind of bad one."""

    rules: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def reject(self, rule: str, source: str, row: int, *, detail: str) -> None:
        """Count a bad record."""
        self.rules["bad"] += 1
        self.bad[rule] += 1
        self.examples.setdefault(rule, f"{source}, row {row}: {detail}")

    def judge(self, max_bad: float) -> None:
        """Raise CorpusError if more than `max_bad` of the records were bad."""
        bad, read = self.rules["bad"], self.rules["read"]
        if bad > max_bad * read:
            rules = "; ".join(
                f"{n} x {rule}, the first in {self.examples[rule]}" for rule, n in self.bad.most_common()
            )
            raise CorpusError(
                f"{bad} of {read} records are bad ({bad / read:.2%}), max_bad allows {max_bad:.2%}. "
                f"{rules}. Mend the file, correct `format` or `text_field`, or raise `max_bad`"
            )

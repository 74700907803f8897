"""Words and sentences by regular expressions: what every rule that counts words counts.

The thresholds of the rules hold for this splitter and no other, so it is frozen: a test lists its splits.
"""

from __future__ import annotations

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SPACED_WORD = regex.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
_WORD = regex.compile(rf"[{_UNSPACED}]|[\w--[{_UNSPACED}]]+(?:['’][\w--[{_UNSPACED}]]+)*|[^\w\s]+", regex.VERSION1)
_HAS_UNSPACED = regex.compile(f"[{_UNSPACED}]")
_SENTENCE_END = regex.compile(r"[.?!…]+[\"'”’»)\]]*(?=\s)|[。？！｡]+[」』”’）]*|[।॥۔؟]+(?=\s)")


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, with inner apostrophes; runs of other signs; and the single characters of
    scripts that put no space between words."""
    pattern = _WORD if _HAS_UNSPACED.search(text) else _SPACED_WORD
    found: list[str] = pattern.findall(text)
    return found


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence; together they cover the text. A sentence ends after its closing signs."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if text[ends[-1] if ends else 0 :].strip():
        ends.append(len(text))
    return list(zip([0, *ends[:-1]], ends, strict=True))

"""Words and sentences by regular expressions: what every rule that counts words counts.

The rules' thresholds were set with spaCy's or NLTK's words, where every bracket and quotation mark is one. These are
near to spaCy's English ones (docs/filters.md gives the agreement), the same for every language, and need no package.
The thresholds hold for this splitter and no other, so it is frozen: a test lists its splits.
"""

from __future__ import annotations

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SIGNS = r"['’]\w+|\.{2,}|-{2,}|[^\w\s]|_"
_SPACED_WORDS = regex.compile(rf"(?:https?://|www\.)\S+|[^\W_]\w*(?:[.,@/]\w+)*|{_SIGNS}")
_HAS_UNSPACED = regex.compile(f"[{_UNSPACED}]")
_LETTER = rf"[\w--[{_UNSPACED}]]"
_WORDS = regex.compile(
    rf"(?:https?://|www\.)[\S--[{_UNSPACED}]]+|[{_UNSPACED}]|[\w--[_{_UNSPACED}]]{_LETTER}*(?:[.,@/]{_LETTER}+)*|"
    + _SIGNS.replace(r"\w+", f"{_LETTER}+"),
    regex.VERSION1,
)
_SENTENCE_END = regex.compile(r"(?<![.?!…])[.?!…]++[\"'”’»)\]]*+(?=\s)|[。？！｡]+[」』”’）]*|[।॥۔؟]+")


def words(text: str) -> list[str]:
    """Words, numbers, addresses, contracted endings and single signs (runs of dots or dashes are one) in their order.

    Scripts that put no space between words give single characters. Together they are the text without its whitespace.
    """
    return list((_WORDS if _HAS_UNSPACED.search(text) else _SPACED_WORDS).findall(text))


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence; together they cover the text. A sentence ends after its closing signs."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if text[ends[-1] if ends else 0 :].strip():
        ends.append(len(text))
    return list(zip([0, *ends], ends, strict=False))

"""Strings on which implementations of a tokenizer part, and the choice of a backend by them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.corpus.tokenizer import backends

ONE_LINER = 1 << 20
"""Characters of the longest probe."""

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say they've won; she'd agree, we're sure.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; l'été où naïve façade, mañana, Łódź, İstanbul.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак ґанок.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΣΊΣΥΦΟΣ ς",
    "我能吞下玻璃而不伤身体。人口约１４亿，东京都2024年。",
    "いろはにほへと ちりぬるを、カタカナ、パソコン々。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣، مكتوب بالعربية ــ.",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण १२३ क्षत्रिय",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி, ქართული ენა, Հայերեն լեզու, አማርኛ",
    "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # 0x1F, 1_000.5e-3\n\n\n    if a<=b and not c[-1]: pass\n",
    'https://example.org/a/b?q=%20&x=1#top <p class="a">&nbsp;</p> \\frac{1}{2} $x^2$ -- *** === ~~~ |||',
)
ATOMS = (
    *("'s", "'S", "'t", "'re", "'VE", "'ll", "'d", "'m", "'ſ", "’s", "''", "it's's"),
    *("0", "7", "42", "123", "1234", "12345678", "3.14", "1,000", "²", "½", "Ⅷ", "①", "٣٤", "१२", "𝟙𝟚", "１２"),
    *(" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f", " \n", "\n ", " \t \r\n  x"),
    *("\xa0", "\u3000", "\u2009", "\u2028", "\u1680", "\u180e", "\u200b", "\u200d", "\ufeff", "\xad", "\u202e"),
    *("🙂", "👨\u200d👩\u200d👧\u200d👦", "👍🏽", "🇩🇪🇫🇷", "❤️", "e\u0301", "é", "a\u0308\u0323", "ก็", "\u0301"),
    *("ﬁ", "ǅ", "ª", "ß", "ẞ", "▁", "Ġ", "<0x0A>", "##a", "</w>"),
    *("\ufffd", "\ud7ff", "\ue000", "\uffff", "\U0010ffff", "\U00042019", "𐌰", "𠀀"),
    *("\x00", "\x01", "\x04", "\x07", "\x08", "\x1b", "\x1d", "\x7f", "\x85", "]\x04)"),
)


def texts(raw: dict[str, Any]) -> list[str]:
    """The strings for one tokenizer, its own special tokens among them: a few hundred, and a line of a megabyte."""
    added = [token["content"] for token in raw.get("added_tokens") or []]
    edges = [
        edge.replace("{}", atom) for atom in (*ATOMS, *added[:16]) for edge in ("{}", "a{}b", " {} {}1", "1{}  {}\n")
    ]
    runs = [letter * count for letter in ("a", " ", "0", "\n", "=", "é", "語", "A ", "ab") for count in (17, 4096)]
    ranges = ["".join(map(chr, range(i, i + 0x400))) for i in (0x80, 0x400, 0x900, 0x2000, 0x3000, 0xA640, 0x1F300)]
    words = [word for sentence in SENTENCES for word in sentence.split(" ")] + [*added[:16], "", "2024", "it's"]
    line = " ".join(random.Random(0).choices(words, k=ONE_LINER // 7))
    return [
        "",
        *SENTENCES,
        *map(str.upper, SENTENCES),
        *edges,
        *runs,
        *ranges,
        "".join(added),
        "\n".join(SENTENCES),
        line,
    ]


def difference(a: backends.Flat, b: backends.Flat, texts: Sequence[str]) -> str | None:
    """Where the first text with different ids parts, or None: the text's beginning, the token's number, both ids."""
    for i, text in enumerate(texts):
        ours, theirs = (ids[offsets[i] : offsets[i + 1]] for ids, offsets in (a, b))
        if not np.array_equal(ours, theirs):
            shared = min(len(ours), len(theirs))
            at = int(np.argmin(np.append(ours[:shared] == theirs[:shared], False)))
            own, expected = (str(ids[at]) if at < len(ids) else "the end" for ids in (ours, theirs))
            return f"the text that starts {text[:60]!r}: token {at} is {own}, not {expected}"
    return None


def fastest(raw: dict[str, Any], *, reference: backends.Reference) -> tuple[backends.Backend, int]:
    """The fastest installed backend that agrees with the reference on every probe, and how many there were.

    One that is installed and cannot be used is named in a warning.
    """
    probes = texts(raw)
    for kind in backends.candidates(raw):
        try:
            backend = kind(raw, reference=reference)
            where = difference(backend.encode(probes), reference.encode(probes), probes)
        except ImportError:
            continue
        except ValueError as error:
            warnings.warn(f"{kind.__name__.lower()} refuses the tokenizer: {error}", RuntimeWarning, stacklevel=3)
            continue
        if where is None:
            return backend, len(probes)
        warnings.warn(f"{backend.name} is not used, it differs on {where}", RuntimeWarning, stacklevel=3)
    return reference, 0

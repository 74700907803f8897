"""The filters of a corpus: a model each, told apart by `rule`; tasks/corpus/filters applies them, docs/filters.md says
what they drop.

They are made for prose. A knob that may be None is off then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self, Union

from pydantic import Field, model_validator

from tasks import plugin
from tasks.settings.fields import Above, Frozen, NotNegative, Positive

Share1 = Annotated[float, Field(gt=0, le=1)]
"""A share, 1 included. 0 is not: datatrove takes it for "off"."""


class Length(Frozen):
    """Documents too short or too long, in characters."""

    rule: Literal["length"]
    min_chars: Positive = 1
    max_chars: Positive | None = None

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is less than min_chars = {self.min_chars}")
        return self


class GopherQuality(Frozen):
    """Gopher's quality rules (arXiv 2112.11446, appendix A1.1), by datatrove's GopherQualityFilter, its defaults."""

    rule: Literal["gopher_quality"]
    min_doc_words: Positive = 50
    max_doc_words: Positive | None = 100_000
    min_avg_word_length: Above | None = 3.0
    max_avg_word_length: Above | None = 10.0
    max_symbol_word_ratio: Share1 | None = 0.1
    max_bullet_lines_ratio: Share1 | None = 0.9
    max_ellipsis_lines_ratio: Share1 | None = 0.3
    max_non_alpha_words_ratio: Share1 | None = 0.8
    """datatrove's name; it is the least share of words with a letter in them."""
    min_stop_words: Positive | None = 2
    stop_words: list[str] | None = None
    """English ones if absent: the, be, to, of, and, that, have, with."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        for what in ("doc_words", "avg_word_length"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if None not in (low, high) and high < low:
                raise ValueError(f"max_{what} = {high} is less than min_{what} = {low}, and no document passes")
        return self


class GopherRepetition(Frozen):
    """Gopher's repetition rules (arXiv 2112.11446, table A1), by datatrove's GopherRepetitionFilter, its defaults."""

    rule: Literal["gopher_repetition"]
    dup_line_frac: Share1 | None = 0.3
    dup_para_frac: Share1 | None = 0.3
    dup_line_char_frac: Share1 | None = 0.2
    dup_para_char_frac: Share1 | None = 0.2
    top_n_grams: dict[Positive, Share1] = Field(default={2: 0.2, 3: 0.18, 4: 0.16})
    """n: largest share of the characters in the commonest n-gram of words."""
    dup_n_grams: dict[Positive, Share1] = Field(default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})
    """n: largest share of the characters in repeated n-grams of words."""


class C4Quality(Frozen):
    """C4's rules (arXiv 1910.10683, section 2.2), by datatrove's C4QualityFilter, its defaults.

    A verdict only: lines that C4 would cut out do not count as text here, but a document that is kept is kept whole.
    """

    rule: Literal["c4_quality"]
    min_num_sentences: Positive = 5
    """In lines that count."""
    filter_no_terminal_punct: bool = True
    """Lines without . ? ! or a quotation mark at their end do not count."""
    min_words_per_line: Positive = 3
    max_word_length: Positive = 1000
    filter_javascript: bool = True
    filter_policy: bool = True
    """Lines on cookies, terms of use and the like do not count."""
    filter_lorem_ipsum: bool = True
    filter_curly_bracket: bool = True


class FineWebQuality(Frozen):
    """FineWeb's own rules (arXiv 2406.17557, section 3.6), by datatrove's FineWebQualityFilter, its defaults."""

    rule: Literal["fineweb_quality"]
    line_punct_thr: Share1 = 0.12
    """Least share of lines that end in punctuation."""
    line_punct_exclude_zero: bool = False
    short_line_thr: Share1 = 0.67
    """Largest share of lines of at most short_line_length characters."""
    short_line_length: Positive = 30
    char_duplicates_ratio: Share1 = 0.01
    """Largest share of characters in repeated lines."""
    new_line_ratio: Above = 0.3
    """Most line breaks per word."""


class Language(Frozen):
    """Documents in another language than these, or in none for sure, by py3langid's model of 139 languages."""

    rule: Literal["language"]
    languages: Annotated[list[str], Field(min_length=1)]
    """ISO 639-1 codes, or 639-3 where there is none."""
    among: list[str] | None = None
    """The languages to choose from; all 139 if absent."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.5
    chars: Positive = 2000
    """Only so many characters of the start are looked at."""


class Fluency(Frozen):
    """Text that is not running words of a language."""

    rule: Literal["fluency"]
    language: str = "en"
    """A code of wordfreq's; not Chinese, Japanese or Korean, whose words spaces do not divide."""
    min_zipf: NotNegative = 4.2
    """Least mean over the words of log10 of the word's occurrences per 10^9 words; an unknown word counts 0."""
    min_function_words: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Least share of the language's 50 commonest words."""
    max_misplaced: Annotated[float, Field(ge=0, le=1)] = 0.0125
    """English only: most articles, per word, before a word that cannot follow one; one of them never counts."""


class Advertisement(Frozen):
    """English advertisements, by prices, numbers to call and phrases that sell."""

    rule: Literal["advertisement"]
    max_per_100_words: NotNegative = 1.0
    min_kinds: Positive = 2
    """Documents with fewer kinds of signs are kept at any number of them."""


CORE = (Length, GopherQuality, GopherRepetition, C4Quality, FineWebQuality, Language, Fluency, Advertisement)
if TYPE_CHECKING:
    Filter = (
        Length | GopherQuality | GopherRepetition | C4Quality | FineWebQuality | Language | Fluency | Advertisement
    )
else:
    _RULES = (*CORE, *(module.Rule for module in plugin.modules("filter").values()))
    Filter = Annotated[Union[_RULES], Field(discriminator="rule")]  # noqa: UP007

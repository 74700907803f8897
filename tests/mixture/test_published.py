from __future__ import annotations

import pytest

from tasks.mixture import published


def test_the_mixes_are_those_of_the_papers_and_sum_to_one() -> None:
    assert {name: sum(mix.values()) for name, mix in published.MIXES.items()} == pytest.approx(
        dict.fromkeys(published.MIXES, 1.0)
    )
    assert published.MIXES["llama"]["cc"] == 0.67
    assert published.MIXES["llama_moe"]["c4"] == 0.492


@pytest.mark.parametrize(
    "names",
    [
        ["cc", "c4", "github", "wiki", "book", "arxiv", "stack"],
        ["en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack"],
        ["redpajama-commoncrawl", "redpajama-c4", "github", "wikipedia", "books", "arxiv", "stackexchange"],
    ],
)
def test_domains_are_known_by_the_names_of_llama_llama_moe_and_slimpajama(names: list[str]) -> None:
    assert list(published.weights("llama", names).values()) == list(published.MIXES["llama"].values())


def test_a_corpus_may_lack_some_domains_and_an_unknown_one_is_named() -> None:
    assert published.weights("sheared_llama", ["c4", "book"]) == {"c4": 0.492, "book": 0.091}
    with pytest.raises(ValueError, match=r"knows the domains cc, c4, .*, and not legal; rename"):
        published.weights("llama", ["c4", "legal"])
    with pytest.raises(ValueError, match=r"two of book, books are the same domain"):
        published.weights("llama", ["book", "books"])

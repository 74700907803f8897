"""Published mixes over SlimPajama's seven domains, for corpora whose domains carry their names."""

from __future__ import annotations

from collections.abc import Iterable

MIXES = {
    "llama": {"cc": 0.67, "c4": 0.15, "github": 0.045, "wiki": 0.045, "book": 0.045, "arxiv": 0.025, "stack": 0.02},
    "sheared_llama": {
        "cc": 0.361, "c4": 0.492, "github": 0.008, "wiki": 0.031, "book": 0.091, "arxiv": 0.007, "stack": 0.01,
    },
}  # fmt: skip
"""LLaMA (arXiv 2302.13971, table 1), and the mix at the end of Sheared-LLaMA's training (arXiv 2310.06694), with which
LLaMA-MoE was trained (arXiv 2406.16554, section 4.2)."""
MIXES["llama_moe"] = MIXES["sheared_llama"]

_ALSO = {
    "commoncrawl": "cc", "wikipedia": "wiki", "books": "book", "stackexchange": "stack",
    "redpajamacommoncrawl": "cc", "redpajamac4": "c4", "redpajamagithub": "github", "redpajamawikipedia": "wiki",
    "redpajamabook": "book", "redpajamaarxiv": "arxiv", "redpajamastackexchange": "stack",
}  # fmt: skip
"""Other spellings, without case, `_` and the `en_` of LLaMA-MoE's folders: RedPajama's and SlimPajama's."""


def weights(mix: str, domains: Iterable[str]) -> dict[str, float]:
    """The mix's shares of the domains, not normalised: a corpus may lack some of the seven.

    Raises:
        ValueError: a domain is none of the seven, or two are the same.
    """
    shares, named = MIXES[mix], {domain: _plain(domain) for domain in domains}
    if unknown := [domain for domain, plain in named.items() if plain not in shares]:
        raise ValueError(
            f"mixture.method = {mix!r} knows the domains {', '.join(shares)}, and not {', '.join(unknown)}; rename "
            "them in the corpus, or give the shares with method: explicit"
        )
    if len(set(named.values())) < len(named):
        raise ValueError(f"mixture.method = {mix!r}: two of {', '.join(named)} are the same domain; use explicit")
    return {domain: shares[plain] for domain, plain in named.items()}


def _plain(domain: str) -> str:
    name = domain.lower().removeprefix("en_").replace("_", "").replace("-", "")
    return _ALSO.get(name, name)

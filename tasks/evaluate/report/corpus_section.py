"""The report's corpus section: domains, dropped records by rule, and two charts."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tasks.evaluate.report import charts
from tasks.evaluate.report.results import Results


def section(results: Results) -> dict[str, Any]:
    """The template's variables."""
    return {
        "domains": domains(results),
        "names": list(results.corpus_metrics["domains"]),
        "drops": drops(results.corpus_metrics["domains"]),
        "figures": figures(results),
        "encoder": encoder(results.corpus_metrics["encoder"]),
    }


def domains(results: Results) -> list[dict[str, str]]:
    """A row for each domain."""
    entries = results.corpus_metrics["domains"]
    total = sum(sum(entry["tokens"].values()) for entry in entries.values())
    return [
        {
            "domain": name,
            "license": entry["license"],
            "source": entry["source"],
            "documents": _splits(entry["documents"]),
            "tokens": _splits(entry["tokens"]),
            "share": f"{sum(entry['tokens'].values()) / total:.1%}",
            "bytes_per_token": f"{entry['bytes_per_token']:.2f}",
            "trained": f"{results.pretrain['domain_tokens'].get(name, 0):,}",
            "weight": results.weight(name),
            "epochs": f"{results.pretrain['domain_epochs'].get(name, 0.0):.3f}",
        }
        for name, entry in entries.items()
    ]


def drops(entries: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, a value per domain): records read, the share that each rule dropped, and the share kept.

    Rules that dropped nothing anywhere are left out; a domain without a rule, or without records, has none to show.
    """
    counts = [entry["rules"] for entry in entries.values()]
    rules = dict.fromkeys(rule for count in counts for rule, n in count.items() if n and rule not in {"read", "kept"})
    rows = [("records read", [f"{count['read']:,}" for count in counts])]
    for rule in [*rules, "kept"]:
        rows.append((rule, [f"{n / count['read']:.1%}" if (n := count.get(rule)) else "–" for count in counts]))
    return rows


def figures(results: Results) -> list[dict[str, Any]]:
    """Tokens per domain, and how long the documents are."""
    tokens = {
        name: {
            "training": entry["tokens"]["train"],
            "validation": entry["tokens"]["validation"],
            "test": entry["tokens"]["test"],
        }
        for name, entry in results.corpus_metrics["domains"].items()
    }
    return [
        {
            "title": "Tokens per domain",
            "chart": Markup(charts.bars(tokens, label="tokens; 1k = 1,000")),
            "caption": "Before domain weights, which set the share of each domain in a training batch.",
        },
        {
            "title": "Document lengths",
            "chart": Markup(charts.histograms(results.lengths, label="tokens per document; 1k = 1,024")),
            "caption": "A bar covers lengths from one power of two to the next. Its height is the share of the "
            "domain's documents, on the same scale for all domains.",
        },
    ]


def encoder(made: dict[str, Any]) -> str:
    """Names the tokenizer implementation that made the ids, and how it was checked."""
    return (
        f"Tokenised by {made['backend']}, compared with the reference tokenizer on {made['probed']:,} probes and "
        f"{made['sampled']:,} documents of the corpus."
    )


def _splits(counts: dict[str, int]) -> str:
    return f"{counts['train']:,} / {counts['validation']:,} / {counts['test']:,}"

"""Brings pairs of sentences to one shape, whether they come from the hub or from the files that SNLI publishes."""

from __future__ import annotations

from typing import Any

LABELS = ("entailment", "neutral", "contradiction")


def process_docs(dataset: Any) -> Any:
    """Give every item premise, hypothesis and label (an index into LABELS), and drop those without a gold label."""
    shaped = dataset.map(process_doc)
    return shaped.filter(lambda item: item["label"] >= 0)


def process_doc(item: dict[str, Any]) -> dict[str, Any]:
    """One item; label is -1 where annotators did not agree."""
    label = item["gold_label"] if "gold_label" in item else item["label"]
    return {
        "premise": item["sentence1"] if "sentence1" in item else item["premise"],
        "hypothesis": item["sentence2"] if "sentence2" in item else item["hypothesis"],
        "label": label if isinstance(label, int) else LABELS.index(label) if label in LABELS else -1,
    }

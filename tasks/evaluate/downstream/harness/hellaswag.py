"""Formats HellaSwag items with one `ctx` field like the prompt of lm-eval's own `hellaswag` task (version 1.0)."""

from __future__ import annotations

import re
from typing import Any

from lm_eval.tasks.hellaswag.utils import preprocess

# The data set joins its two halves as ctx = ctx_a + " " + ctx_b; lm-eval capitalises ctx_b, which begins in lower case
# after ctx_a's full stop, and is empty in the WikiHow items (those with bracketed headings).
_UNFINISHED = re.compile(r"(?<=[.!?] )[^.!?]+$")


def process_docs(dataset: Any) -> Any:
    """Add `query`, `choices` and `gold` to a data set of {activity_label, ctx, endings, expected_index}."""
    return dataset.map(process_doc)


def process_doc(item: dict[str, Any]) -> dict[str, Any]:
    """One item's prompt, cleaned endings, and the index of the right one."""
    context = item["ctx"]
    if not context.startswith("["):
        context = _UNFINISHED.sub(lambda match: match[0].capitalize(), context)
    return {
        "query": preprocess(f"{item['activity_label']}: {context}"),
        "choices": [preprocess(ending) for ending in item["endings"]],
        "gold": item["expected_index"],
    }

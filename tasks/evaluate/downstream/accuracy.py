"""Scores downstream tasks with lm-eval, and keeps what each item contributed."""

from __future__ import annotations

import math
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.evaluate.downstream.collection import Collection
    from tasks.settings import Task

_BOOTSTRAP = 1000  # draws, for metrics without a closed-form stderr; lm-eval draws none for means
_DIGEST = 12
"""Characters of an item's digest: of 2^24 items two are alike with probability one half."""


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    collection: Collection,
    batch: int | Literal["auto"],
    dtype: str = "auto",
) -> dict[str, Any]:
    """Score a model on a task.

    Args:
        model: float32 weights; in bfloat16 the forward pass runs under autocast.
        tokenizer: the model's.
        task: one of pipelines.yaml.
        collection: where its items are.
        batch: rows of tokens per forward pass, or auto; see `batches.fitting`.
        dtype: of the forward pass: float32, bfloat16, or auto.

    Raises:
        ValueError: lm-eval knows no such task.
        UnavailableError: its items cannot be had.

    Returns:
        scores: {metric: score, metric_stderr: its standard error, n, num_fewshot, harness, dtype, version, chance}. A
        metric whose stderr lm-eval does not know has none. chance: the accuracy of random guessing, of multiple-choice
        tasks only. items: {items: [digest of each], values: {metric: [of each item]}} of the metrics that are means.
    """
    from lm_eval import evaluate

    from tasks.evaluate import batches
    from tasks.evaluate.downstream.harness_model import ROW, Packed

    rows = batches.fitting(model, batch, length=ROW)
    precision = precision_of(model) if dtype == "auto" else dtype
    results = evaluate(
        Packed(model, tokenizer, batch=rows, dtype=precision),
        collection.load(task),
        limit=task.limit,
        bootstrap_iters=_BOOTSTRAP,
    )
    scores = _scores(task, results)
    return {"scores": scores | {"dtype": precision}, "items": _items(results, scores)}


def precision_of(model: PreTrainedModel) -> str:
    """bfloat16 where the model's device multiplies in it, else float32."""
    from tasks.moe import device

    return "bfloat16" if device.has_bfloat16(model.device.type) else "float32"


def _scores(task: Task, results: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for key, value in results["results"][task.name].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            continue  # `alias`, and "N/A" where lm-eval has no stderr
        entry[_named(metric, filter_name)] = value
    entry["n"] = sum(sample["effective"] for sample in results["n-samples"].values())
    entry["num_fewshot"] = task.num_fewshot
    entry["harness"] = f"lm-eval {metadata.version('lm_eval')}"
    entry["version"] = str(results["versions"].get(task.name, ""))
    if (guess := _chance(results)) is not None:
        entry["chance"] = guess
    return entry


def _named(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}_{filter_name}"


def _items(results: Any, scores: dict[str, Any]) -> dict[str, Any]:
    """What each item contributed to the metrics whose score is the mean over all items.

    Of a task with subtasks they are those of all of them, one after the other.
    """
    digests: dict[str, list[str]] = {}
    values: dict[str, list[float]] = {}
    for name in sorted(results["samples"]):
        for sample in results["samples"][name]:
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], bool | int | float):
                    key = _named(metric, sample["filter"])
                    values.setdefault(key, []).append(float(value))
                    digests.setdefault(key, []).append(sample["doc_hash"][:_DIGEST])
    means = [key for key, each in values.items() if _is_mean(scores.get(key), each)]
    items = digests[means[0]] if means else []
    return {"items": items, "values": {key: values[key] for key in means if digests[key] == items}}


def _is_mean(score: float | None, values: list[float]) -> bool:
    return score is not None and math.isclose(score, math.fsum(values) / len(values), rel_tol=0, abs_tol=1e-9)


def _chance(results: Any) -> float | None:
    """Accuracy of random guessing: one over the number of answers, averaged over the items; None if not known.

    Known for multiple choice that lm-eval scores itself: a request per answer, two where acc_mutual_info is asked for.
    """
    shares = []
    for name, items in results["samples"].items():
        config = results["configs"][name]
        if config["output_type"] != "multiple_choice" or config.get("process_results"):
            return None
        doubled = any(entry["metric"] == "acc_mutual_info" for entry in config.get("metric_list") or [])
        for item in items:
            if isinstance(item["target"], list):  # several answers count as right
                return None
            shares.append((2 if doubled else 1) / len(item["resps"]))
    return sum(shares) / len(shares) if shares else None

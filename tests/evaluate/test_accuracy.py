"""Downstream tasks: lm-eval's scores on a local file against an independent loop."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks.hellaswag.utils import process_docs

from tasks import settings, sources
from tasks.evaluate import accuracy
from tasks.evaluate.harness import hellaswag
from tasks.moe import checkpoint

ITEMS = [
    {
        "id": f"item-{i}",
        "activity_label": "Sorting" if i % 2 else "Reading",
        "ctx": f"The list has {i} entries. it" if i % 3 else f"[header] How to read [title] Open page {i}.",
        "endings": ["is sorted in place.", "flies away [substeps] slowly.", f"returns {i}.", "None"],
        "expected_index": i % 4,
    }
    for i in range(12)
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> settings.Task:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "cases.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return settings.Task(name="hellaswag_100", source=f"dir:{file}", sha256=digest)


def choices_by_hand(model: Any, tokenizer: Any, item: dict[str, Any]) -> list[tuple[float, int]]:
    """(log-likelihood, characters) of each ending after the prompt, one forward pass each."""
    import torch

    doc = hellaswag.process_doc(item)
    sums = []
    for ending in doc["choices"]:
        context = tokenizer(doc["query"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{doc['query']} {ending}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        start = len(context)
        total = sum(logits[i - 1, whole[i]].item() for i in range(start, len(whole)))
        sums.append((total, len(ending)))
    return sums


def test_scores_agree_with_a_loop_and_carry_all_that_makes_them_readable(
    task: settings.Task, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoTokenizer

    monkeypatch.setattr(accuracy, "precision_of", lambda model: "float32")
    model = checkpoint.load(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prepared = accuracy.prepare([task], Path("work"))
    score = accuracy.run(model, tokenizer, tasks=[task], prepared=prepared, batch=3)["hellaswag_100"]

    by_hand = [choices_by_hand(model, tokenizer, item) for item in ITEMS]
    right = [
        int(np.argmax([ll for ll, _ in c])) == item["expected_index"] for c, item in zip(by_hand, ITEMS, strict=True)
    ]
    normed = [
        int(np.argmax([ll / n for ll, n in c])) == item["expected_index"]
        for c, item in zip(by_hand, ITEMS, strict=True)
    ]
    assert score["acc"] == pytest.approx(np.mean(right))
    assert score["acc_norm"] == pytest.approx(np.mean(normed))
    p = float(np.mean(right))
    assert score["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(ITEMS) - 1)))
    assert (score["n"], score["num_fewshot"], score["dtype"]) == (12, 0, "float32")
    assert score["harness"].startswith("lm-eval 0.4")


def test_a_limit_takes_that_many_items(task: settings.Task, tiny_model: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    few = task.model_copy(update={"limit": 5})
    model = checkpoint.load(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    score = accuracy.run(model, tokenizer, tasks=[few], prepared=accuracy.prepare([few], Path("work")), batch=3)
    assert score["hellaswag_100"]["n"] == 5


def test_other_bytes_than_those_pinned_are_refused(task: settings.Task) -> None:
    wrong = task.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(sources.SourceError, match="not those that were pinned"):
        accuracy.prepare([wrong], Path("work"))


def test_a_local_task_without_a_description_is_refused_with_the_known_ones(task: settings.Task) -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch\.yaml must describe it; described: .*hellaswag_100"):
        accuracy.prepare([task.model_copy(update={"name": "nosuch"})], Path("work"))


def test_no_tasks_import_nothing_and_score_nothing() -> None:
    assert accuracy.run(None, None, tasks=[], prepared=Path("nowhere"), batch=1) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ctx_a", "ctx_b"),
    [
        ("A man holds a violin. He speaks to the camera.", "the other man"),
        ('The word "kanaha" is shown. Waves break!', "more windsurfers"),
        ("[header] How to read [title] Open a book. [step] Turn the page.", ""),
    ],
)
def test_prompts_are_those_of_lm_evals_own_hellaswag(ctx_a: str, ctx_b: str) -> None:
    from datasets import Dataset

    endings = ["goes [title] home", "[substeps] stays.", "is  gone", "x"]
    original = {"activity_label": "Music", "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings, "label": "2"}
    expected = process_docs(Dataset.from_list([original]))[0]
    item = {"activity_label": "Music", "ctx": f"{ctx_a} {ctx_b}", "endings": endings, "expected_index": 2}
    made = hellaswag.process_doc(item)
    assert (made["query"], made["choices"], made["gold"]) == (expected["query"], expected["choices"], 2)


@pytest.mark.parametrize("pinned", [False, True])
def test_items_that_change_after_the_first_model_was_judged_are_refused(task: settings.Task, pinned: bool) -> None:
    """An evaluation that was killed goes on with the next model, and all are judged by the same items."""
    one = task if pinned else task.model_copy(update={"sha256": None})
    file = Path(task.source.removeprefix("dir:")) if task.source else Path()
    versions = accuracy.versions([one])
    accuracy.prepare([one], Path("work"), versions=versions)
    before = file.stat()
    file.write_text(file.read_text().replace("sorted", "Sorted"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pinned or accuracy.versions([one]) != versions
    with pytest.raises(sources.SourceError, match="sha256 is" if pinned else "cases.jsonl changed since"):
        accuracy.prepare([one], Path("work"), versions=versions)

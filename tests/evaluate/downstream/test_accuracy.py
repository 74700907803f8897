"""Downstream tasks: lm-eval's scores on a local file against an independent loop."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks.hellaswag.utils import process_docs

from tasks import settings
from tasks.evaluate.downstream import accuracy, collection
from tasks.evaluate.downstream.harness import hellaswag
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


@pytest.fixture(scope="module")
def judged(tiny_model: Path) -> Any:
    """The tiny model and its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    return checkpoint.load(tiny_model, dtype=torch.float32), AutoTokenizer.from_pretrained(tiny_model)


def score(judged: Any, task: settings.Task, **options: Any) -> dict[str, Any]:
    """`accuracy.score` in float32, with the items of this task alone."""
    items = collection.Collection(collection.prepare([task], Path("work")), tasks=[task])
    return accuracy.score(*judged, task, collection=items, **{"batch": 3, "dtype": "float32"} | options)


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


def test_scores_agree_with_a_loop_and_carry_all_that_makes_them_readable(task: settings.Task, judged: Any) -> None:
    found = score(judged, task)
    by_hand = [choices_by_hand(*judged, item) for item in ITEMS]
    right = [
        int(np.argmax([ll for ll, _ in c])) == item["expected_index"] for c, item in zip(by_hand, ITEMS, strict=True)
    ]
    normed = [
        int(np.argmax([ll / n for ll, n in c])) == item["expected_index"]
        for c, item in zip(by_hand, ITEMS, strict=True)
    ]
    scores = found["scores"]
    assert scores["acc"] == pytest.approx(np.mean(right))
    assert scores["acc_norm"] == pytest.approx(np.mean(normed))
    p = float(np.mean(right))
    assert scores["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(ITEMS) - 1)))
    assert (scores["n"], scores["num_fewshot"], scores["dtype"], scores["chance"]) == (12, 0, "float32", 0.25)
    assert scores["harness"].startswith("lm-eval 0.4")
    assert found["items"]["values"] == {"acc": right, "acc_norm": normed}
    assert len(set(found["items"]["items"])) == 12


def test_a_limit_takes_that_many_items(task: settings.Task, judged: Any) -> None:
    few = score(judged, task.model_copy(update={"limit": 5}), dtype="auto", batch="auto")
    assert few["scores"]["n"] == len(few["items"]["items"]) == 5


QUESTIONS = [
    {
        "support": f"There are {i} stones. ",
        "question": f"How many stones, {'please' * (i % 3)}?",
        "correct_answer": str(i),
        "distractor1": "none",
        "distractor2": f"{i + 1} or so",
        "distractor3": "all of them",
    }
    for i in range(9)
]
WORDS = [
    ": one kind",
    *(f"{a} {a}ly {b} {b}ly" for a, b in itertools.permutations(("calm", "quick", "slow", "rare", "apt"), 2)),
]


def test_items_and_scores_are_those_of_lm_evals_own_command(
    judged: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of lm-eval's collection with shots, and one that only we describe."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.chdir(tmp_path)
    for split, questions in {"test": QUESTIONS[:6], "train": QUESTIONS[6:]}.items():
        Path(f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions))
    Path("words.txt").write_text("\n".join(WORDS) + "\n")
    sources = {split: {"source": f"dir:{split}.jsonl"} for split in ("test", "train")}
    tasks = [
        settings.Task.model_validate({"name": "sciq", "files": sources, "num_fewshot": 2}),
        settings.Task(name="word_analogies", source="dir:words.txt"),
    ]
    ours = {task.name: score(judged, task) for task in tasks}
    quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the rest of the collection is large
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    for task in tasks:
        options = {
            "--model": "hf",
            "--model_args": f"pretrained={tiny_model},dtype=float32",
            "--tasks": task.name,
            "--num_fewshot": str(task.num_fewshot),
            "--include_path": "work",
            "--device": "cpu",
            "--output_path": f"out-{task.name}",
        }
        words = [word for pair in options.items() for word in pair]
        monkeypatch.setattr("sys.argv", ["lm_eval", "run", *words, "--log_samples"])
        cli_evaluate()
        (results,) = Path(f"out-{task.name}").rglob("results_*.json")
        (samples,) = Path(f"out-{task.name}").rglob("samples_*.jsonl")
        theirs = json.loads(results.read_text())["results"][task.name]
        found, items = ours[task.name]["scores"], ours[task.name]["items"]
        assert found["n"] == (6 if task.name == "sciq" else 20)
        for metric in [key for key in found if f"{key}_stderr" in found]:
            assert found[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-5)
        by_digest = {row["doc_hash"][:12]: row for row in map(json.loads, samples.read_text().splitlines())}
        assert by_digest.keys() == set(items["items"])
        for metric, values in items["values"].items():
            assert values == [float(by_digest[digest][metric]) for digest in items["items"]]
        assert "acc" in items["values"]


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

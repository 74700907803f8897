"""Suites: tasks that exist, with their shots, which a pipeline may change one by one."""

from __future__ import annotations

from typing import Any

import pytest

from tasks import settings
from tasks.settings import harness, suites


def evaluate(**fields: Any) -> settings.Evaluate:
    return settings.Evaluate.model_validate({"seq_len": 64} | fields)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_task_of_a_suite_is_known_and_has_items(suite: str) -> None:
    judged = suites.judged(evaluate(suites=[suite]))
    assert [task.name for task in judged] == [task.name for task in suites.SUITES[suite]]
    assert [(task.name, why) for task in judged if (why := harness.why_no_items(task.name, task.local))] == []


def test_llama_moes_eleven_tasks_have_the_papers_shots() -> None:
    shots = {task.name: task.num_fewshot for task in suites.SUITES["llama_moe"] if task.num_fewshot}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "nq_open": 32, "mmlu": 5}
    assert len(suites.SUITES["llama_moe"]) == 11


def test_a_single_task_changes_what_it_names_of_the_suites_and_limits_hold_for_those_without() -> None:
    files = {"test": {"source": "dir:sciq.jsonl"}}
    tasks = [{"name": "sciq", "files": files, "limit": 7}, {"name": "copa"}]
    judged = {task.name: task for task in suites.judged(evaluate(suites=["llama_moe"], tasks=tasks, limit=50))}
    assert (judged["sciq"].metric, judged["sciq"].limit, list(judged["sciq"].local)) == ("acc_norm", 7, ["test"])
    assert (judged["copa"].limit, judged["arc_challenge"].limit, judged["arc_challenge"].num_fewshot) == (50, 50, 25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suites": ["lama"]}, "suites: 'lama' is not defined; defined: llama_moe, open_llm, reliability"),
        ({"suites": ["llama_moe", "open_llm"]}, "open_llm wants winogrande with 5 shots, and another suite with 0"),
        (
            {"tasks": [{"name": "adv_sst2", "adversarial_of": "sst2"}]},
            "half of a pair with 'sst2', which is no other task",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_with_the_fix(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suites.judged(evaluate(**fields))


def test_two_suites_agree_where_the_pipeline_says_the_shots() -> None:
    both = evaluate(suites=["llama_moe", "open_llm"], tasks=[{"name": "winogrande", "num_fewshot": 5}])
    assert {task.name: task.num_fewshot for task in suites.judged(both)}["winogrande"] == 5


@pytest.mark.parametrize(
    ("name", "files", "why"),
    [
        ("sciq", {"test"}, None),
        ("piqa", {"test"}, "reads no split 'test'; the splits that it reads: train, validation"),
        ("anli_r1", {"train_r1"}, "its items are those of the split 'test_r1', which has no file"),
        ("mmlu", {"test"}, "is a group of lm-eval, and files belong to a task"),
        ("word_analogies", set(), "describes it over a local file; give its `source` or `files`"),
        ("snli_hard", {"test"}, None),
        ("snli_hard", {"train"}, "reads no split 'train'"),
        ("adv_mnli", set(), None),
    ],
)
def test_files_belong_to_the_splits_that_a_description_reads(name: str, files: set[str], why: str | None) -> None:
    found = harness.why_no_items(name, files)
    assert (found is None) if why is None else (why in str(found))

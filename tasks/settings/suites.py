"""Suites: tasks that are judged together, with their shots, and the metric of each that counts in the suite's mean.

A task without a source is one of lm-eval's collection, or one that tasks/evaluate/downstream/harness describes over
data of the hub. A pipeline names a suite in `evaluate.suites`, and gives local files of a task in `evaluate.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.settings.evaluate import Evaluate, File, Task

_STYLES = "https://raw.githubusercontent.com/AI-secure/DecodingTrust/a2e191bfb6581ea805fb897a9d4a249896ef5dc9/data/ood/styles"


def _task(name: str, metric: str = "acc", shots: int = 0, **fields: object) -> Task:
    return Task.model_validate({"name": name, "metric": metric, "num_fewshot": shots} | fields)


def _style(name: str, file: str) -> Task:
    source = File(source=f"{_STYLES}/{file}")
    return _task(f"sst2_{name}", ood_of="sst2", files={"validation": source}, license="CC-BY-SA-4.0")


SUITES: Mapping[str, tuple[Task, ...]] = {
    # The eleven tasks of LLaMA-MoE (arXiv 2406.16554, table 2). Its harness normed MMLU by length too. AGIEval has the
    # test questions of LogiQA; lm-eval's `logiqa` is read by a script, which `datasets` refuses.
    "llama_moe": (
        _task("sciq", "acc_norm"),
        _task("piqa", "acc_norm"),
        _task("winogrande"),
        _task("arc_easy", "acc_norm"),
        _task("arc_challenge", "acc_norm", 25),
        _task("hellaswag", "acc_norm", 10),
        _task("agieval_logiqa_en", "acc_norm"),
        _task("boolq", shots=32),
        _task("lambada_openai"),
        _task("nq_open", "exact_match_remove_whitespace", 32),
        _task("mmlu", shots=5),
    ),
    # The Open LLM Leaderboard's first six (lm-eval's group `openllm`).
    "open_llm": (
        _task("arc_challenge", "acc_norm", 25),
        _task("hellaswag", "acc_norm", 10),
        _task("truthfulqa_mc2"),
        _task("mmlu", shots=5),
        _task("winogrande", shots=5),
        _task("gsm8k", "exact_match_strict-match", 5),
    ),
    # MoE-RBench (arXiv 2406.11353), zero-shot instead of fine-tuned; Style-OOD is DecodingTrust's (arXiv 2306.11698).
    "reliability": (
        _task("snli"),
        _task(
            "snli_hard",
            adversarial_of="snli",
            files={"test": File(source="https://nlp.stanford.edu/projects/snli/snli_1.0_test_hard.jsonl")},
            license="CC-BY-SA-4.0",
        ),
        _task("anli_r1", adversarial_of="snli"),
        _task("anli_r2", adversarial_of="snli"),
        _task("anli_r3", adversarial_of="snli"),
        _task("mnli"),
        _task("adv_mnli", adversarial_of="mnli"),
        _task("sst2"),
        _task("adv_sst2", adversarial_of="sst2"),
        _style("shakespeare", "dev_shake_p0.tsv"),
        _style("bible", "dev_bible_p0.tsv"),
        _style("romantic", "dev_romantic_p0.tsv"),
        _style("tweet", "dev_tweet_p0.tsv"),
        _task("truthfulqa_mc1"),
        _task("truthfulqa_mc2"),
    ),
}


def judged(evaluate: Evaluate) -> list[Task]:
    """The tasks of all suites of a pipeline, then its single ones, each with its limit.

    Raises:
        ValueError: there is no such suite, two suites want a task with different shots, or half of a pair is missing.
    """
    own, found = {task.name: task for task in evaluate.tasks}, dict[str, Task]()
    for suite in evaluate.suites:
        if suite not in SUITES:
            raise ValueError(f"suites: {suite!r} is not defined; defined: {', '.join(SUITES)}")
        for task in SUITES[suite]:
            before = found.get(task.name, task)
            settled = task.name in own and "num_fewshot" in own[task.name].model_fields_set
            if before.num_fewshot != task.num_fewshot and not settled:
                raise ValueError(
                    f"suites: {suite} wants {task.name} with {task.num_fewshot} shots, and another suite with "
                    f"{before.num_fewshot}; set its num_fewshot under `tasks`, or leave one of the suites out"
                )
            found[task.name] = task
    for name, task in own.items():
        told = {field: getattr(task, field) for field in task.model_fields_set}
        found[name] = found[name].model_copy(update=told) if name in found else task
    for task in found.values():
        of = task.adversarial_of or task.ood_of
        if of and of not in found.keys() - {task.name}:
            raise ValueError(
                f"tasks: {task.name} is half of a pair with {of!r}, which is no other task of this pipeline; add it"
            )
    return [task.model_copy(update={"limit": task.limit or evaluate.limit}) for task in found.values()]

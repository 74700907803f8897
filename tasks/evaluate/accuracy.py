"""Scores downstream tasks with lm-eval: a task of the hub by its name, or harness/NAME.yaml over a local file."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch, sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.settings import Task

HARNESS = Path(__file__).parent / "harness"
_BOOTSTRAP = 1000  # draws, for metrics without a closed-form stderr; lm-eval draws none for means
CACHE = scratch.ROOT / "sources"


def versions(tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """The versions of the files of local tasks, {task: {file: version}}. Raises sources.SourceError as `prepare`."""
    by_task = {}
    for task in tasks:
        if task.source is not None:
            by_task[task.name] = sources.fetch(task.source, CACHE, sha256=task.sha256).versions()
    return by_task


def prepare(tasks: Sequence[Task], folder: Path, *, versions: dict[str, dict[str, str]] | None = None) -> Path:
    """Fetch the files of local tasks and write `folder`/NAME.yaml, which points lm-eval's task at them.

    Args:
        tasks: those of pipelines.yaml.
        folder: where their files and descriptions go.
        versions: the expected versions of the files, so that all models are scored on the same ones.

    Returns:
        the folder to give to `run`.

    Raises:
        sources.SourceError: a file cannot be had, its sha256 differs, or it changed.
        FileNotFoundError: a task has a source but no harness/NAME.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if task.source is None:
            continue
        template = HARNESS / f"{task.name}.yaml"
        if not template.is_file():
            known = ", ".join(sorted(path.stem for path in HARNESS.glob("*.yaml")))
            raise FileNotFoundError(
                f"pipelines.yaml: evaluate.tasks: {task.name!r} has a source, so {template} must describe it; "
                f"described: {known}. For a task of the hub leave `source` out"
            )
        fetched = sources.fetch(task.source, CACHE, sha256=task.sha256)
        files = []
        with fetched.unchanged(versions[task.name] if versions else None):
            for i, path in enumerate(fetched.paths):
                target = folder / f"{task.name}-{i}{''.join(Path(path).suffixes)}"
                with fetched.fs.open(path, "rb") as read, target.open("wb") as write:
                    shutil.copyfileobj(read, write)
                files.append(str(target.resolve()))
        _write_yaml(
            folder / f"{task.name}.yaml",
            {
                "include": str(template.resolve()),
                "dataset_kwargs": {"data_files": {"test": files}, "cache_dir": str((folder / "datasets").resolve())},
            },
        )
    return folder


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[Task],
    prepared: Path,
    batch: int,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks.

    Args:
        model: float32 weights; on a processor with bfloat16 the forward pass runs under bfloat16 autocast.
        tokenizer: the model's.
        tasks: those of pipelines.yaml.
        prepared: the folder that `prepare` returned.
        batch: sequences per forward pass.

    Raises:
        ValueError: lm-eval knows no such task.
        ConnectionError: the task's data are on the hub, and it cannot be reached.

    Returns:
        {task: {metric: score, metric_stderr: its standard error, n, num_fewshot, harness, dtype, version, chance}}. A
        metric whose stderr lm-eval does not know has none. chance: the accuracy of random guessing, of multiple-choice
        tasks only.
    """
    if not tasks:
        return {}
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of being given a model that is loaded already
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    precision = precision_of(model)
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch,
        mixed_precision_dtype=None if precision == "float32" else precision,
        softmax_dtype="float32",
    )
    if not sys.stderr.isatty():
        lm = _without_bars(lm)
    hub = any(task.source is None for task in tasks)
    manager = TaskManager(include_path=prepared, include_defaults=hub)
    scored = {}
    for task in tasks:
        if task.name not in manager.all_tasks:
            raise ValueError(
                f"pipelines.yaml: evaluate.tasks: lm-eval {metadata.version('lm_eval')} knows no task {task.name!r}; "
                "correct the name, or give a `source` and describe it in tasks/evaluate/harness/"
            )
        try:
            results = simple_evaluate(
                lm,
                tasks=[task.name],
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,  # they say how many answers each item has
                task_manager=manager,
            )
        except ConnectionError as error:
            raise ConnectionError(
                f"pipelines.yaml: evaluate.tasks: {task.name} needs the hub: {error}; "
                "run where it can be reached, or give the task a local `source`"
            ) from error
        scored[task.name] = _scores(task, results) | {"dtype": precision}
    return scored


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
        entry[metric if filter_name == "none" else f"{metric}_{filter_name}"] = value
    entry["n"] = sum(sample["effective"] for sample in results["n-samples"].values())
    entry["num_fewshot"] = task.num_fewshot
    entry["harness"] = f"lm-eval {metadata.version('lm_eval')}"
    entry["version"] = str(results["versions"].get(task.name, ""))
    if (guess := _chance(results)) is not None:
        entry["chance"] = guess
    return entry


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


def _without_bars(lm: Any) -> Any:
    from functools import partial

    for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, request, partial(getattr(lm, request), disable_tqdm=True))
    return lm


def _write_yaml(path: Path, value: Any) -> None:
    from ruamel.yaml import YAML

    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(value, file)

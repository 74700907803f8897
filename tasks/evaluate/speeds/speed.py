"""Speed of models on one text as their user meets it: in transformers, with moe_kernels, and in llama.cpp."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks import architectures
from tasks.engines import llama_cpp, memory, turns
from tasks.evaluate.speeds import speed_table

PARENT = speed_table.PARENT
STOCK, OURS, LLAMA_CPP = "transformers", "moe_kernels", "llama.cpp"
QUANTISED = "Q8_0"
Row = dict[str, Any]
"""An engine's figures: engine, dtype, threads, device, models {name: `figures`, or a reason if it does not run}.

`memory` in a model's figures: bytes at the peak of a process that loads it alone and reads the prompt; on a GPU, those
of the GPU.
"""


def cores() -> int:
    """The cores that this process may use, or fewer if OMP_NUM_THREADS says so."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or available))


def in_transformers(
    folders: Mapping[str, Path],
    text: turns.Text,
    *,
    dtypes: Sequence[str],
    threads: Sequence[int],
    device: str = "cpu",
) -> list[Row]:
    """Speed as `AutoModelForCausalLM.from_pretrained` gives it, and with `experts_implementation="moe_kernels"`.

    Args:
        folders: the checkpoints by name, the dense parent's is PARENT.
        text: what they read.
        dtypes: names of torch's.
        threads: numbers of them; on a GPU, one number.
        device: `cpu` or `cuda`.

    Returns:
        Two rows for each dtype and number of threads, one if no model is sparse. A model without experts has the same
        figures in both. `experts` is transformers' default implementation of a sparse model's experts, or eager where
        that cannot run them.

    If the process fails, for lack of memory for example, every model has its last words as reason.
    """
    request = {
        "folders": {name: str(path) for name, path in folders.items()},
        "text": asdict(text),
        "dtypes": list(dtypes),
        "threads": list(threads),
        "device": device,
    }
    command = [sys.executable, "-m", "tasks.evaluate.speeds.in_transformers"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        models = {name: {"reason": said[-1]} for name in folders}
        return [
            row(engine, dtype, count, device=device, models=models)
            for dtype in dtypes
            for count in threads
            for engine in (STOCK, OURS)
        ]
    result: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_llama_cpp(
    folders: Mapping[str, Path],
    text: turns.Text,
    *,
    threads: Sequence[int],
    scratch: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Speed in llama.cpp of the files that tasks.engines.gguf writes of the checkpoints.

    Args:
        folders, text, threads: as in `in_transformers`.
        scratch: a folder for the files, which are removed.
        progress: called with a line on each file.

    Returns:
        A row for each number of threads; a model that llama.cpp does not run has a reason. `elastic` has the figures
        at the other values of top_k that a model serves: {top_k: {name: figures}}.
    """
    reasons, files = {}, {}
    if llama_cpp.installed():
        from tasks.engines import gguf

        for name, folder in folders.items():
            try:
                files[name] = scratch / f"{name}.gguf"
                written = gguf.export(folder, files[name], kind=QUANTISED)
                progress(f"{name}: {written['bytes'] / 1e6:.0f} MB in {QUANTISED}")
            except ValueError as error:
                reasons[name] = str(error).removeprefix(f"{folder}: llama.cpp cannot run it: ")
                del files[name]
    else:
        reasons = dict.fromkeys(
            folders, f"{llama_cpp.PACKAGE} is not installed; pip install 'moeforge[llama-cpp]' brings it"
        )
    rows: list[Row] = []
    peaks: dict[str, int | None] = {}
    others_of = {name: _other_top_ks(folders[name]) for name in files}
    at = {f"{name}, top_k {top_k}": (name, top_k) for name, top_ks in others_of.items() for top_k in top_ks}
    top_ks = {label: top_k for label, (_, top_k) in at.items()}
    read = files | {label: files[name] for label, (name, _) in at.items()}
    try:
        for count in threads:
            rates, refused = llama_cpp.measure(read, text, threads=count, top_ks=top_ks)
            models = {name: figures(rates[name], rates.get(PARENT), text=text) for name in rates}
            for name in files.keys() & rates:
                if name not in peaks:
                    peaks[name] = memory.of_file(files[name], text, threads=max(threads))
                models[name] |= known(peaks[name])
            others = {name: {"reason": reason} for name, reason in (reasons | refused).items()}
            shown = {name: (models | others)[name] for name in folders}
            rows.append(row(LLAMA_CPP, QUANTISED, count, device="cpu", models=shown))
            for label, (name, top_k) in at.items():
                if label in models:
                    rows[-1].setdefault("elastic", {}).setdefault(str(top_k), {})[name] = models[label]
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
            file.with_suffix(".Modelfile").unlink(missing_ok=True)
    return rows


def _other_top_ks(folder: Path) -> list[int]:
    """Those that a checkpoint serves beside the one that it loads with."""
    config = json.loads((folder / "config.json").read_text())
    return [top_k for top_k in architectures.elastic(config) if top_k != config["num_experts_per_tok"]]


def known(peak: int | None) -> dict[str, int]:
    """The peak memory among a model's figures, if it is known."""
    return {} if peak is None else {"memory": peak}


def row(engine: str, dtype: str, threads: int, *, device: str, models: dict[str, dict[str, Any]]) -> Row:
    """An engine's figures."""
    return {"engine": engine, "dtype": dtype, "threads": threads, "device": device, "models": models}


def basis(text: turns.Text) -> dict[str, int]:
    """What was read: tokens of the prompt, tokens decoded and tokens before them, and the most repeats."""
    return {"prompt": text.prompt, "after": turns.SHORT, "new": text.new, "repeats": text.repeats}


def figures(
    rates: Mapping[str, Sequence[float]], parent: Mapping[str, Sequence[float]] | None, *, text: turns.Text
) -> dict[str, Any]:
    """What repeats come to.

    Args:
        rates: tokens/s by repeat, {prompt, decode}.
        parent: the dense parent's, repeat by repeat of the same minute; None if it does not run.
        text: what was read.

    Returns:
        prompt, decode: {median, min, max} of the tokens/s; repeats: their number; first_token: seconds to the
        first token after the prompt;
        ratio: {prompt, decode: {median, min, max}} of the quotients by the parent's, absent without it.
    """
    result: dict[str, Any] = {what: _spread(values) for what, values in rates.items()}
    result["repeats"] = len(rates["prompt"])
    result["first_token"] = _rounded(text.prompt / result["prompt"]["median"])
    if parent:
        result["ratio"] = {
            what: _spread([ours / theirs for ours, theirs in zip(values, parent[what], strict=True)])
            for what, values in rates.items()
        }
    return result


def _spread(values: Sequence[float]) -> dict[str, float]:
    summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: _rounded(value) for name, value in summary.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

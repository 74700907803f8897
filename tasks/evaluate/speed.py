"""Speed of models on one text as their user meets it: in transformers, with moe_kernels, and in llama.cpp.

    python -m tasks.evaluate.speed < request.json > rates.json

`in_transformers` runs this command, so that nothing of its caller's process is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.engines import llama_cpp, turns
from tasks.evaluate import speed_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARENT = speed_table.PARENT
STOCK, OURS, LLAMA_CPP = "transformers", "moe_kernels", "llama.cpp"
QUANTISED = "Q8_0"
Row = dict[str, Any]
"""An engine's figures: engine, dtype, threads, device, models {name: `figures`, or a reason if it does not run}."""


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
    command = [sys.executable, "-m", "tasks.evaluate.speed"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        models = {name: {"reason": said[-1]} for name in folders}
        return [
            _row(engine, dtype, count, device=device, models=models)
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
    rows = []
    others_of = {name: _other_top_ks(folders[name]) for name in files}
    at = {f"{name}, top_k {top_k}": (name, top_k) for name, top_ks in others_of.items() for top_k in top_ks}
    top_ks = {label: top_k for label, (_, top_k) in at.items()}
    read = files | {label: files[name] for label, (name, _) in at.items()}
    try:
        for count in threads:
            rates, refused = llama_cpp.measure(read, text, threads=count, top_ks=top_ks)
            models = {name: figures(rates[name], rates.get(PARENT), text=text) for name in rates}
            others = {name: {"reason": reason} for name, reason in (reasons | refused).items()}
            shown = {name: (models | others)[name] for name in folders}
            rows.append(_row(LLAMA_CPP, QUANTISED, count, device="cpu", models=shown))
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


def _row(engine: str, dtype: str, threads: int, *, device: str, models: dict[str, dict[str, Any]]) -> Row:
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


class _Reader:
    """A model of transformers with a KV cache, whose experts are computed by `experts` (None: it has none)."""

    def __init__(self, model: PreTrainedModel, *, experts: str | None) -> None:
        self._model, self.experts = model, experts

    def restart(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        if self.experts:
            self._model.set_experts_implementation(self.experts)

    def read(self, ids: Sequence[int]) -> int:
        import torch

        with torch.inference_mode():
            ids_BL = torch.tensor([list(ids)], device=self._model.device)
            model: Any = self._model  # the cache is the fourth argument of every class; its name has changed in 5.23
            out = model(ids_BL, None, None, self._cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())  # waits for the device


def _readers(model: PreTrainedModel, *, ids: Sequence[int]) -> Iterator[tuple[str, _Reader | str]]:
    """(engine, the model in it or why it does not run there)."""
    if not architectures.is_moe(model.config):
        yield STOCK, _Reader(model, experts=None)
        return
    for engine, implementations in {STOCK: (model.config._experts_implementation, "eager"), OURS: (OURS,)}.items():
        reason = ""
        for experts in implementations:
            reader = _Reader(model, experts=experts)
            try:
                reader.restart()
                reader.read(ids)
            except (RuntimeError, NotImplementedError) as error:  # grouped_mm wants rows of a multiple of 16 bytes
                reason = reason or f"{experts}: {str(error).splitlines()[0]}"
            else:
                yield engine, reader
                break
        else:
            yield engine, reason


def _measure(request: dict[str, Any]) -> list[Row]:
    """The rows of `in_transformers`, in this process."""
    import moe_kernels
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    moe_kernels.register()
    text = turns.Text(**request["text"])
    rows = []
    for dtype in request["dtypes"]:
        readers: dict[tuple[str, str], _Reader] = {}
        reasons: dict[tuple[str, str], str] = {}
        for name, folder in request["folders"].items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
            torch.nn.Module.to(model, torch.device(request["device"]))
            for engine, found in _readers(model.eval(), ids=text.ids[: turns.SHORT]):
                if isinstance(found, str):
                    reasons[engine, name] = found
                else:
                    readers[engine, name] = found
        for threads in request["threads"]:
            torch.set_num_threads(threads)
            rates = turns.take(readers, text)
            for engine in dict.fromkeys(engine for engine, _ in [*readers, *reasons]):
                models: dict[str, dict[str, Any]] = {}
                for name in request["folders"]:
                    key = (engine, name) if (engine, name) in readers or (engine, name) in reasons else (STOCK, name)
                    if key in reasons:
                        models[name] = {"reason": reasons[key]}
                        continue
                    models[name] = figures(rates[key], rates[STOCK, PARENT], text=text)
                    if experts := readers[key].experts:
                        models[name]["experts"] = experts
                rows.append(_row(engine, dtype, threads, device=request["device"], models=models))
    return rows


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))

"""Speed and peak memory of models in transformers, with its own experts and with moe_kernels.

    python -m tasks.evaluate.speeds.in_transformers < request.json > rates.json

`speed.in_transformers` runs this command, so that nothing of its caller's process is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.engines import memory, turns
from tasks.evaluate.speeds import speed
from tasks.evaluate.speeds.speed import OURS, STOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def _load(folder: Path, *, dtype: str, device: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    )
    torch.nn.Module.to(model, torch.device(device))
    model.eval()
    return model


def _peaks(folder: Path, dtype: str, request: dict[str, Any]) -> dict[str, int]:
    """Bytes at the peak of this process, or of its GPU, which loads a model and reads the prompt, by engine.

    Engines follow each other on the model that is loaded; what the one before has used is forgotten.
    """
    import torch

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if request["device"] == "cuda" else memory.peak()

    text = turns.Text(**request["text"])
    torch.set_num_threads(max(request["threads"]))
    model = _load(folder, dtype=dtype, device=request["device"])
    loaded, found = peak(), {}
    for engine, reader in _readers(model, ids=text.ids[: turns.SHORT]):
        if not isinstance(reader, str):
            reader.restart()
            reader.read(text.ids[: text.prompt])
            found[engine] = max(loaded, peak())
        torch.cuda.reset_peak_memory_stats() if request["device"] == "cuda" else memory.forget_peak()
    return found


def _import_classes(folders: Iterable[str]) -> None:
    """Import the models' classes, which transformers does on use, once for all copies of this process."""
    import transformers

    for folder in folders:
        for name in json.loads(Path(folder, "config.json").read_text())["architectures"]:
            getattr(transformers, name)


def _measure(request: dict[str, Any]) -> list[speed.Row]:
    """The rows of `in_transformers`, in this process."""
    import moe_kernels
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    moe_kernels.register()
    text = turns.Text(**request["text"])
    rows = []
    _import_classes(request["folders"].values())
    peaks = {
        (dtype, name): memory.in_fork(partial(_peaks, Path(folder), dtype, request))
        for dtype in request["dtypes"]
        for name, folder in request["folders"].items()
    }  # before anything runs here
    for dtype in request["dtypes"]:
        readers: dict[tuple[str, str], _Reader] = {}
        reasons: dict[tuple[str, str], str] = {}
        for name, folder in request["folders"].items():
            model = _load(Path(folder), dtype=dtype, device=request["device"])
            for engine, found in _readers(model, ids=text.ids[: turns.SHORT]):
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
                    models[name] = speed.figures(rates[key], rates[STOCK, speed.PARENT], text=text)
                    models[name] |= speed.known(peaks[dtype, name].get(key[0]))
                    if experts := readers[key].experts:
                        models[name]["experts"] = experts
                rows.append(speed.row(engine, dtype, threads, device=request["device"], models=models))
    return rows


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))

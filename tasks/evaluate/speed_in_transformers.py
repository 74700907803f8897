"""Speed and peak memory of models in transformers, with its own experts and with moe_kernels.

    python -m tasks.evaluate.speed_in_transformers < request.json > rates.json

`speed.in_transformers` runs this command, so that nothing of its caller's process is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.engines import memory, turns
from tasks.evaluate import speed
from tasks.evaluate.speed import OURS, STOCK

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


def _readers(
    model: PreTrainedModel, *, ids: Sequence[int], engines: Sequence[str] = (STOCK, OURS)
) -> Iterator[tuple[str, _Reader | str]]:
    """(engine, the model in it or why it does not run there)."""
    if not architectures.is_moe(model.config):
        yield STOCK, _Reader(model, experts=None)
        return
    for engine in engines:
        implementations = (model.config._experts_implementation, "eager") if engine == STOCK else (OURS,)
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


def _peak(folder: Path, engine: str, dtype: str, request: dict[str, Any]) -> int | None:
    """Bytes at the peak of this process, or of its GPU, once it has loaded a model and read the prompt.

    None if the model does not run in the engine.
    """
    import torch

    text = turns.Text(**request["text"])
    torch.set_num_threads(max(request["threads"]))
    model = _load(folder, dtype=dtype, device=request["device"])
    (_, reader) = next(_readers(model, ids=text.ids[: turns.SHORT], engines=[engine]))
    if isinstance(reader, str):
        return None
    reader.restart()
    reader.read(text.ids[: text.prompt])
    return torch.cuda.max_memory_allocated() if request["device"] == "cuda" else memory.peak()


def _measure(request: dict[str, Any]) -> list[speed.Row]:
    """The rows of `in_transformers`, in this process."""
    import moe_kernels
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    moe_kernels.register()
    text = turns.Text(**request["text"])
    rows = []
    peaks = {
        (dtype, engine, name): memory.in_fork(partial(_peak, Path(folder), engine, dtype, request))
        for dtype in request["dtypes"]
        for name, folder in request["folders"].items()
        for engine in (STOCK, OURS)
        if engine == STOCK or _is_sparse(Path(folder))
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
                    models[name] |= speed.known(peaks[dtype, *key])
                    if experts := readers[key].experts:
                        models[name]["experts"] = experts
                rows.append(speed.row(engine, dtype, threads, device=request["device"], models=models))
    return rows


def _is_sparse(folder: Path) -> bool:
    return architectures.is_moe(json.loads((folder / "config.json").read_text()))


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))

"""Text samples and their speed: greedy decoding with a KV cache, one sequence at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.moe import loss

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("The capital of France is", "Once upon a time,", "def fibonacci(n):\n")
NEW_TOKENS = 24
_STOCK_BATCHES = 2
_STOCK_TOKENS = 12


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Continue PROMPTS by NEW_TOKENS tokens each, or up to the end of the text.

    Returns:
        texts: the continuations, in the order of PROMPTS; decode: tokens per second, median over the steps.
    """
    written, seconds = [], []
    for prompt in PROMPTS:
        ids, steps = greedy(model, tokenizer(prompt)["input_ids"], new=NEW_TOKENS)
        written.append(tokenizer.decode(ids, skip_special_tokens=True))
        seconds += steps
    return {"texts": written, "decode": _rate(seconds)}


def greedy(model: PreTrainedModel, ids: Sequence[int], *, new: int) -> tuple[list[int], list[float]]:
    """Choose the likeliest token `new` times, or until the model ends the text.

    Returns:
        the new ids without the one that ends the text, and the seconds of each step after the prompt was read.
    """
    import torch
    from transformers import DynamicCache

    config: Any = model.generation_config or model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    new_ids: list[int] = []
    seconds: list[float] = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)  # fourth argument of every class; its name has changed in 5.23
        out: Any = model(torch.tensor([list(ids)], device=model.device), None, None, cache, use_cache=True)
        chosen = int(out.logits[0, -1].argmax())
        while chosen not in ends:
            new_ids.append(chosen)
            if len(new_ids) == new:
                break
            start = time.perf_counter()
            step = torch.tensor([[chosen]], device=model.device)
            out = model(step, None, None, cache, use_cache=True)
            chosen = int(out.logits[0, -1].argmax())  # waits for the device
            seconds.append(time.perf_counter() - start)
    return new_ids, seconds


def stock_speed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Mapping[str, np.ndarray], *, batch: int
) -> dict[str, Any]:
    """Speed of a sparse model as `AutoModelForCausalLM.from_pretrained` gives it, without moe_kernels.

    The model has its own experts implementation again afterwards.

    Returns:
        engine: transformers' default experts implementation here, or eager where that cannot run them; forward:
        tokens per second of a forward pass and loss, the median of a few batches; decode: tokens per second of greedy
        decoding, None if the model ends the text at once.
    """
    ours = model.config._experts_implementation
    engine = model.get_correct_experts_implementation(None)
    parts = [ids_BL[:batch] for ids_BL in windows.values()]
    try:
        engine = _first_pass(model, parts[0][:1, :64], engine=engine)
        speeds = []
        for part in (parts * _STOCK_BATCHES)[:_STOCK_BATCHES]:
            start = time.perf_counter()
            loss.window_nll(model, part, batch=batch)
            speeds.append(part.size / (time.perf_counter() - start))
        _, seconds = greedy(model, tokenizer(PROMPTS[0])["input_ids"], new=_STOCK_TOKENS)
    finally:
        model.set_experts_implementation(ours)
    return {"engine": engine, "forward": statistics.median(speeds), "decode": _rate(seconds)}


def _first_pass(model: PreTrainedModel, ids_BL: np.ndarray, *, engine: str) -> str:
    """A warm-up pass with `engine`, or with eager if that fails; returns the implementation that ran.

    grouped_mm wants rows of a multiple of 16 bytes, and raises RuntimeError for other widths of experts.
    """
    model.set_experts_implementation(engine)
    try:
        loss.window_nll(model, ids_BL, batch=1)
    except RuntimeError:
        if engine == "eager":
            raise
        return _first_pass(model, ids_BL, engine="eager")
    return engine


def _rate(seconds: list[float]) -> float | None:
    return 1 / statistics.median(seconds) if seconds else None

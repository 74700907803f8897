"""Text samples: greedy decoding with a KV cache, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("The capital of France is", "Once upon a time,", "def fibonacci(n):\n")
NEW_TOKENS = 24


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The continuations of PROMPTS by NEW_TOKENS tokens each, or up to the end of the text."""
    continued = (greedy(model, tokenizer(prompt)["input_ids"], new=NEW_TOKENS) for prompt in PROMPTS)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in continued]


def greedy(model: PreTrainedModel, ids: Sequence[int], *, new: int) -> list[int]:
    """The likeliest `new` tokens one after the other, or those before the one that ends the text."""
    import torch
    from transformers import DynamicCache

    config: Any = model.generation_config or model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    new_ids: list[int] = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)  # fourth argument of every class; its name has changed in 5.23
        out: Any = model(torch.tensor([list(ids)], device=model.device), None, None, cache, use_cache=True)
        chosen = int(out.logits[0, -1].argmax())
        while chosen not in ends:
            new_ids.append(chosen)
            if len(new_ids) == new:
                break
            step = torch.tensor([[chosen]], device=model.device)
            out = model(step, None, None, cache, use_cache=True)
            chosen = int(out.logits[0, -1].argmax())
    return new_ids

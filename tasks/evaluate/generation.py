"""Text samples: greedy decoding with a KV cache, all prompts at once, and how much a text repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("The capital of France is", "Once upon a time,", "def fibonacci(n):\n")
NEW_TOKENS = 24
NGRAM = 4


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """The continuations of PROMPTS by NEW_TOKENS tokens each, or up to the end of the text.

    Returns:
        texts, and the `repetition` of each.
    """
    continued = greedy(model, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], new=NEW_TOKENS)
    return {
        "texts": [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in continued],
        "repetition": [repetition(ids) for ids in continued],
    }


def repetition(ids: Sequence[int], *, n: int = NGRAM) -> float:
    """Share of n-grams that stood there before: 1 - different / all (seq-rep-n, arXiv 1908.04319, section 6).

    0 for a text of fewer than n tokens.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, new: int) -> list[list[int]]:
    """The likeliest `new` tokens one after the other, or those before the one that ends the text.

    Args:
        prompts: token ids. A step reads all weights whatever the number of prompts, so they are continued together.

    Returns:
        the new ids of each prompt.
    """
    import torch
    from transformers import DynamicCache

    config: Any = model.generation_config or model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    head: Any = model.get_output_embeddings()
    longest = max(map(len, prompts))
    made: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    with torch.inference_mode():
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(model.device)
        cache = DynamicCache(config=model.config)  # fourth argument of every class; its name has changed in 5.23
        for _ in range(new):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            # The whole model would also compute the balance loss, where its config asks for one.
            out: Any = model.base_model(ids, mask, positions, cache, use_cache=True)
            ids = head(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
            for i, chosen in enumerate(ids[:, 0].tolist()):
                running[i] = running[i] and chosen not in ends
                if running[i]:
                    made[i].append(chosen)
            if not any(running):
                break
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return made

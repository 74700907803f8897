"""Text samples: all prompts at once against one after the other, and the share of repeated n-grams."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.evaluate import generation
from tasks.moe import checkpoint


@pytest.mark.parametrize("end", [None, 1])
def test_prompts_of_any_length_are_continued_together_as_each_by_itself(tiny_model: Path, end: int | None) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, eos_token_id=end, **sizes)).eval()
    prompts = [[5, 6, 7, 8, 9], [3], [4, 2, 11]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                chosen = model(ids).logits[0, -1].argmax()
            if chosen == end:
                break
            ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
        expected.append(ids[0, len(prompt) :].tolist())
    assert generation.greedy(model, prompts, new=6) == expected


def test_samples_have_a_text_and_a_repetition_for_each_prompt(tiny_model: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    model = checkpoint.load(tiny_model, dtype=torch.float32)
    said = generation.samples(model, AutoTokenizer.from_pretrained(tiny_model))
    assert len(said["texts"]) == len(said["repetition"]) == len(generation.PROMPTS)
    assert all(0 <= share < 1 for share in said["repetition"])


@pytest.mark.parametrize(
    ("ids", "share"), [([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 7, 0.75), ([1, 2, 3, 4] * 2, 0.2)]
)
def test_repetition_is_the_share_of_four_grams_that_stood_there_before(ids: list[int], share: float) -> None:
    assert generation.repetition(ids) == pytest.approx(share)

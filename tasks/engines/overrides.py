"""How the engines serve another top_k of an elastic model than the one in its config.json."""

from __future__ import annotations

from typing import Any

from tasks import architectures

FIELD = "num_experts_per_tok"
"""What elastic classes call top_k in config.json."""


def by_engine(config: Any) -> dict[str, str]:
    """What to add to each engine's command, K being one of the model's values; empty if it serves one value alone."""
    if not architectures.elastic(config):
        return {}
    written_as, replaced = architectures.llama_cpp(config), f"'{{\"{FIELD}\": K}}'"
    of_llama_cpp = {"llama.cpp": f"--override-kv {written_as.name}.expert_used_count=int:K"} if written_as else {}
    return of_llama_cpp | {
        "vLLM": f"--hf-overrides {replaced}",
        "SGLang": f"--json-model-override-args {replaced}",
        "transformers": f"from_pretrained(..., {FIELD}=K)",
    }

"""How the engines serve another top_k of an elastic model than the one in its config.json."""

from __future__ import annotations

from typing import Any

from tasks import architectures


def by_engine(config: Any) -> dict[str, str]:
    """What to add to each engine's command, K being one of the model's values; empty if it serves one value alone."""
    if not architectures.elastic(config):
        return {}
    written_as, field = architectures.llama_cpp(config), "'{\"num_experts_per_tok\": K}'"
    of_llama_cpp = {"llama.cpp": f"--override-kv {written_as.name}.expert_used_count=int:K"} if written_as else {}
    return of_llama_cpp | {
        "vLLM": f"--hf-overrides {field}",
        "SGLang": f"--json-model-override-args {field}",
        "transformers": "from_pretrained(..., num_experts_per_tok=K)",
    }

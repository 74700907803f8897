"""Evaluate the dense parent, the MoE before and after training, and the dense child on the same test windows.

    python -m tasks.evaluate PIPELINE

Reads data/models/, data/corpora/, runs/PIPELINE/{moe,trained}, and runs/PIPELINE/control/model where the pipeline has
a dense child. Writes runs/PIPELINE/evaluation.json (the figures), routing.json (tokens per domain, layer and expert),
samples.json (each model's continuations of a few prompts), heldout.json (the evaluated windows, {domain: [[ids]]}),
windows.json (each model's nats on each window, to compare two evaluations by), items.json (what each model scored on
each item of each task) and details.json (what plug-ins measure, {plug-in: content}). Results
are kept by model and task: after a kill, the evaluation continues with the next task, and so does a
plug-in. Speed comes after the models, which then take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tasks import code, scratch, settings
from tasks.engines import turns
from tasks.evaluate import batches, details, generation, likelihood, routing_balance, unseen
from tasks.evaluate.downstream import collection, judging
from tasks.evaluate.machine import machine
from tasks.evaluate.speeds import speed, speed_table
from tasks.settings import suites

MODELS = {
    "dense": "dense parent",
    "split": "MoE before training",
    "trained": "MoE after training",
    "child": "dense child",
    "dense_trained": "parent trained alike",
}
PAIRS = (
    ("trained", "dense"),
    ("trained", "split"),
    ("split", "dense"),
    ("trained", "child"),
    ("trained", "dense_trained"),
)
"""Models whose losses are compared, the first less the second."""
_SAME_SPEED = {"split", "dense_trained"}
_DECODED = 16
"""Tokens whose median time is the speed of decoding: half of those of `bench.speed`."""
LEAST_ADDED_LOSS = 1e-3
"""Nats per token. A split that adds less, such as copies of the FFN, leaves nothing for training to recover."""


def evaluate(name: str) -> None:
    """Evaluate pipeline `name` and write its files. Raises ValueError if model and corpus do not fit."""
    from tasks.corpus import manifest
    from tasks.corpus.sampling import windows
    from tasks.corpus.tokenizer import encoder

    config = settings.load()
    pipeline = config.pipeline(name)
    knobs = pipeline.evaluate
    run = Path("runs") / name
    folders = {"dense": Path("data/models") / pipeline.model, "split": run / "moe", "trained": run / "trained"}
    for key, child in {"child": run / "control/model", "dense_trained": run / "control/parent/model"}.items():
        if child.is_dir():
            folders[key] = child
    corpus = Path("data/corpora") / pipeline.corpus
    contents = manifest.load(corpus)
    manifest.require_tokenizer(contents, folders["dense"])
    ids = windows.test(corpus, seq_len=knobs.seq_len, count=knobs.windows)
    others = windows.unseen(corpus, seq_len=knobs.seq_len, count=knobs.unseen_windows)
    token_bytes = encoder.token_bytes(folders["dense"])
    tasks = suites.judged(knobs)
    versions, missing = collection.versions(tasks)
    inputs = {
        "settings": knobs.model_dump(),
        "tasks": [task.model_dump() for task in tasks],
        "items": versions,
        "corpus": contents.sha256,
        "models": {key: scratch.digest(folder) for key, folder in folders.items()},
        "code": code.fingerprint("tasks.evaluate"),
    }
    with scratch.workspace("evaluate", name, inputs=inputs, priority=scratch.last_used) as folder:
        scratch.report_kept(folder)
        judge = judging.gather(tasks, folder / "tasks", versions=versions, missing=missing)
        done = {}
        for key, path in folders.items():
            print(f"{MODELS[key]}: {path}", flush=True)
            done[key] = _evaluate(path, ids, unseen=others, knobs=knobs, judge=judge, keep=folder / key)
        speeds = _speeds(folders, ids, scratch=folder)
        counted = likelihood.counts(ids, token_bytes=token_bytes)
        scored = {key: result["tasks"] for key, result in done.items()}
        items = judging.by_item(scored, missing=judge.missing)
        outs = {
            "routing": {key: done[key]["load"] for key in ("split", "trained")},
            "samples": samples(done),
            "items": items,
            "heldout": {domain: a.tolist() for domain, a in ids.items()},
            "windows": likelihood.by_window(
                ids, {key: result["nats"] for key, result in done.items()}, token_bytes=token_bytes
            ),
            "details": details.measure(
                details.Subject(
                    models={key: folders[key] for key in ("split", "trained")},
                    windows=lambda count: {domain: ids_BL[:count] for domain, ids_BL in ids.items()},
                    settings=knobs,
                    folder=folder / "details",
                    parent=folders["dense"],
                    index=run / "partition.safetensors",
                )
            ),
        }
        for out, content in outs.items():
            (folder / f"{out}.json").write_text(json.dumps(content))
            scratch.publish(folder / f"{out}.json", run / f"{out}.json")
        evaluation = summarise(
            done,
            test=counted,
            unseen_test=likelihood.counts(others, token_bytes=token_bytes),
            speeds=speeds,
            knobs=knobs,
            method=pipeline.partition.method,
        )
        judging.add(evaluation, scored, items, knobs=knobs, missing=judge.missing)
        scratch.write_json(run / "evaluation.json", evaluation)
        shutil.rmtree(folder)


def _evaluate(
    path: Path, ids: Any, *, unseen: Any, knobs: settings.Evaluate, judge: judging.Judge, keep: Path
) -> dict[str, Any]:
    """Measure a model. Files whose names begin with `keep` hold what is done; it is loaded if something is not."""

    @functools.cache
    def load() -> tuple[Any, Any]:
        import torch
        from transformers import AutoTokenizer

        from tasks.moe import checkpoint, device

        model = checkpoint.load(path, dtype=torch.float32, device=device.default())
        return model, AutoTokenizer.from_pretrained(path, local_files_only=True)

    measured = judging.kept(keep.with_suffix(".json"), lambda: _measure(*load(), ids, unseen=unseen, knobs=knobs))
    scored = judge.scores(load, keep=keep, batch=knobs.batch, dtype=knobs.dtype)
    seconds = measured["seconds"] + sum(entry["seconds"] for entry in scored.values())
    return measured | {"tasks": scored, "seconds": round(seconds, 1)}


def _measure(model: Any, tokenizer: Any, ids: Any, *, unseen: Any, knobs: settings.Evaluate) -> dict[str, Any]:
    """All but the tasks."""
    from tasks.moe import counts

    start = time.perf_counter()

    def progress(domain: str, nats: float) -> None:
        print(f"  {domain}: {nats:.4f} nats/token ({time.perf_counter() - start:.0f} s)", flush=True)

    batch = batches.fitting(model, knobs.batch, length=knobs.seq_len)
    measured = likelihood.measure(model, ids, batch=batch, progress=progress)
    elsewhere = likelihood.measure(model, unseen, batch=batch, progress=progress)
    elastic = likelihood.by_top_k(model, ids, batch=batch)
    said = generation.samples(model, tokenizer)
    sparse = counts.experts(model.config)
    sizes = counts.parameters(model.config)
    return measured | {
        "unseen": elsewhere["nats"],
        "elastic": elastic,
        "parameters": {"total": sizes["total"], "active": sizes["active"]},
        "flops_per_token": counts.flops_per_token(model.config, seq_len=knobs.seq_len)["forward"],
        "experts": {"layers": sparse["layers"], "top_k": sparse["top_k"], "experts": sparse["experts"]},
        "texts": said["texts"],
        "repetition": said["repetition"],
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(model.device.type),
    }


def _speeds(folders: dict[str, Path], ids: Any, *, scratch: Path) -> dict[str, Any]:
    """Speed of the models on the first window: in float32 as all else here, and in llama.cpp.

    Training changes no speed, so the split's is the trained model's, and the trained parent's the parent's.

    Returns:
        What `summarise` calls speed.
    """
    import torch

    from tasks.moe import allocator, device

    here, threads = device.default(), speed.cores()
    allocator.release()
    if here == "cuda":
        torch.cuda.empty_cache()
    text = turns.Text(next(iter(ids.values()))[0].tolist(), new=_DECODED)
    shown: dict[str, Path] = {key: folder for key, folder in folders.items() if key not in _SAME_SPEED}
    print("speed, the models in turns", flush=True)
    start = time.perf_counter()
    rows = speed.in_transformers(shown, text, dtypes=["float32"], threads=[threads], device=here)
    rows += speed.in_llama_cpp(shown, text, threads=sorted({1, threads}), scratch=scratch)
    result = {**speed.basis(text), "engines": rows, "seconds": round(time.perf_counter() - start, 1)}
    for label, cells in speed_table.rows(result, list(shown)):
        print(f"  {label}: {', '.join(f'{MODELS[key]} {cell}' for key, cell in zip(shown, cells, strict=True))}")
    return result


def samples(done: dict[str, Any]) -> dict[str, Any]:
    """The content of samples.json.

    Returns:
        new_tokens; samples: [{prompt, and the text of each model}]; repetition: {model: of each of its texts}.
    """
    rows = [
        {"prompt": prompt} | {key: result["texts"][i] for key, result in done.items()}
        for i, prompt in enumerate(generation.PROMPTS)
    ]
    repeated = {key: [round(share, 4) for share in result["repetition"]] for key, result in done.items()}
    return {"new_tokens": generation.NEW_TOKENS, "samples": rows, "repetition": repeated}


def summarise(
    done: dict[str, Any],
    *,
    test: dict[str, Any],
    unseen_test: dict[str, Any],
    speeds: dict[str, Any],
    knobs: settings.Evaluate,
    method: str,
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        done: {dense, split, trained, and child where there is one: the measurements}.
        test: likelihood.counts of the windows of trained domains.
        unseen_test: the same of unseen domains; {} if there are none.
        speeds: what `_speeds` measured.
        knobs: the settings of the evaluation.
        method: the method that made the experts.

    Returns:
        dense, split, trained, child if it was judged: {loss, perplexity, bits_per_byte: {domain, mean}, parameters
        {total, active}, flops_per_token, tasks, seconds of its evaluation; of an elastic model elastic: {top_k: {loss,
        perplexity, bits_per_byte, active, flops_per_token}}; what unseen.add says}; test: {domains: {windows, tokens,
        bytes}, seq_len, batch}; speed: {prompt, after, new, repeats: tokens read and times, engines: [speed.Row],
        seconds}; difference: {trained_dense, trained_split, split_dense, trained_child if judged: {loss, stderr}},
        first minus second; recovery: the share of the loss added by the split that training recovered, absent if the
        split added no more than noise; routing: {experts, top_k, split, trained: routing_balance.balance}; method;
        machine.
    """
    summary: dict[str, Any] = {"method": method}
    for key, result in done.items():
        summary[key] = likelihood.scores(result["nats"], test)
        for field in ("parameters", "flops_per_token", "seconds"):
            summary[key][field] = result[field]
        if result.get("elastic"):
            summary[key]["elastic"] = {
                top_k: likelihood.scores(each["nats"], test)
                | {field: each[field] for field in ("active", "flops_per_token")}
                for top_k, each in result["elastic"].items()
            }
    summary["test"] = {"domains": test, "seq_len": knobs.seq_len, "batch": knobs.batch}
    summary["speed"] = speeds
    nats = {key: result["nats"] for key, result in done.items()}
    pairs = [pair for pair in PAIRS if pair[1] in nats]
    summary["difference"] = {f"{a}_{b}": likelihood.difference(nats[a], nats[b], test) for a, b in pairs}
    unseen.add(summary, {key: result["unseen"] for key, result in done.items()}, unseen_test, pairs=pairs)
    added = summary["difference"]["split_dense"]
    if added["loss"] > max(2 * added.get("stderr", 0.0), LEAST_ADDED_LOSS):
        summary["recovery"] = -summary["difference"]["trained_split"]["loss"] / added["loss"]
    summary["routing"] = {field: done["trained"]["experts"][field] for field in ("experts", "top_k")}
    for key in ("split", "trained"):
        experts = done[key]["experts"]
        summary["routing"][key] = routing_balance.balance(
            done[key]["load"], layers=experts["layers"], top_k=experts["top_k"]
        )
    summary["machine"] = done["trained"]["machine"]
    return summary


def main() -> int:
    """Run the stage for the pipeline named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    try:
        evaluate(parser.parse_args().pipeline)
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The partition stage: a dense checkpoint becomes a sparse one.

    python -m tasks.partition demo

Reads data/models/<model>/ and, to calibrate and to measure, data/corpora/<corpus>/. Writes runs/<pipeline>/moe/,
runs/<pipeline>/partition.safetensors (which neuron went where) and runs/<pipeline>/partition.json (identity error,
loss of the dense parent and right after the split). A conversion that fails the identity test writes nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import scratch, settings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

    from tasks.partition.index import Index

HELDOUT_WINDOWS = 2
"""Per domain, for the loss before and after; the evaluation measures on more."""
_BATCH = 4
_IDENTITY_TOKENS = 128  # per domain


def run(pipeline: str) -> dict[str, Any]:
    """Run the stage and return its metrics.

    Raises:
        ValueError: settings, model and corpus do not fit together, or the identity test failed.
    """
    from tasks.corpus import manifest

    entry = settings.load().pipeline(pipeline)
    model_dir, corpus_dir = Path("data/models") / entry.model, Path("data/corpora") / entry.corpus
    corpus = manifest.load(corpus_dir)
    manifest.require_tokenizer(corpus, model_dir)
    inputs = {"partition": entry.partition.model_dump(), "seq_len": entry.pretrain.seq_len, "corpus": corpus.sha256}
    target = Path("runs") / pipeline
    with scratch.workspace("partition", pipeline, inputs=inputs) as work:
        shutil.rmtree(work / "moe", ignore_errors=True)
        metrics = _make(entry, model_dir, corpus_dir, work)
        scratch.publish(work / "moe", target / "moe")
        scratch.publish(work / "partition.safetensors", target / "partition.safetensors")
        scratch.write_json(target / "partition.json", metrics)
    return metrics


def _make(entry: settings.Pipeline, model_dir: Path, corpus_dir: Path, work: Path) -> dict[str, Any]:
    import torch

    from tasks.corpus import windows
    from tasks.moe import checkpoint, counts
    from tasks.partition import build, identity, index

    clock = _Clock()
    partition, seq_len = entry.partition, entry.pretrain.seq_len
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense: Any = checkpoint.load(model_dir, device=device)
    stored = dense.dtype
    build.moe_config(dense.config, partition)  # refuses what cannot be built, before any work
    dense = dense.float()  # fitted, tested and measured in float32, whatever the weights are stored in
    heldout = windows.heldout(corpus_dir, seq_len=seq_len, count=HELDOUT_WINDOWS)
    dense_losses = _losses(dense, heldout)
    clock.lap("dense loss")

    split_index, routers, errors = _split(dense, corpus_dir, entry=entry, model_sha256=scratch.digest(model_dir))
    index.write(split_index, work / "partition.safetensors")
    clock.lap("split")

    moe = build.convert(dense, split_index, routers, partition=partition).to(stored)
    build.write(moe, work / "moe", tokenizer_from=model_dir)
    del moe
    clock.lap("write")

    moe = checkpoint.load(work / "moe", dtype=torch.float32, device=device)  # what was written is what is judged
    sample = np.concatenate([ids[:1, :_IDENTITY_TOKENS] for ids in heldout.values()])
    error = identity.error(moe, dense, sample, scale=build.scale(partition))
    identity.require(error, stored)
    clock.lap("identity")
    moe_losses = _losses(moe, heldout)
    clock.lap("moe loss")
    return {
        "identity_error": error,
        "heldout_loss": moe_losses,
        "perplexity": _perplexity(moe_losses),
        "dense": {"heldout_loss": dense_losses, "perplexity": _perplexity(dense_losses)},
        "perplexity_ratio": _perplexity(moe_losses) / _perplexity(dense_losses),
        "heldout_windows": {domain: len(ids) for domain, ids in heldout.items()},
        "layer_error": errors,
        "parameters": counts.parameters(moe.config),
        "ffn_active": (partition.top_k + partition.shared_experts) / (partition.experts + partition.shared_experts),
        "seconds": clock.laps,
    }


def _split(
    dense: LlamaForCausalLM, corpus_dir: Path, *, entry: settings.Pipeline, model_sha256: str
) -> tuple[Index, list[Any], list[float]]:
    from tasks.partition import build, calibration, split
    from tasks.partition.index import Index
    from tasks.partition.progress import Progress

    partition, seq_len = entry.partition, entry.pretrain.seq_len
    meta: dict[str, Any] = {
        "method": partition.method,
        "seed": partition.seed,
        "scale": build.scale(partition),
        "source": entry.model,
        "source_sha256": model_sha256,
        "settings": partition.model_dump(),
        "calibration": [],
    }
    if partition.method == "random":
        found = split.at_random(dense, partition)
    else:
        ids_BL, meta["calibration"] = calibration.draw(
            corpus_dir, seq_len=seq_len, count=partition.calibration_windows, seed=partition.seed
        )
        meta["seq_len"] = seq_len
        with Progress(dense.config.num_hidden_layers, label="partition") as progress:
            found = split.by_activation(dense, ids_BL, partition=partition, report=progress.layer)
    index = Index(layers=found.layers, shared_experts=partition.shared_experts, meta=meta)
    return index, found.routers, found.errors


def _losses(model: PreTrainedModel, heldout: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats per predicted token of each domain."""
    from tasks.moe.loss import window_nll

    return {
        domain: float(window_nll(model, ids, batch=_BATCH).sum() / (ids.shape[0] * (ids.shape[1] - 1)))
        for domain, ids in heldout.items()
    }


def _perplexity(losses: dict[str, float]) -> float:
    """exp of the mean over domains of the loss."""
    from tasks.moe.loss import perplexity

    return perplexity(sum(losses.values()) / len(losses))


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 1), now


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.partition", description="Build experts and router.")
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    pipeline = parser.parse_args().pipeline
    try:
        metrics = run(pipeline)
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"partition {pipeline}: {error}", file=sys.stderr)
        return 1
    dense = metrics["dense"]["perplexity"]
    print(
        f"perplexity {dense:.2f} dense, {metrics['perplexity']:.2f} with {metrics['ffn_active']:.0%} of the FFN "
        f"active ({metrics['perplexity_ratio']:.2f} x); identity error {metrics['identity_error']:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
    from tasks.moe.streamed import Streamed

VALIDATION_WINDOWS = 2
"""Per domain, for the loss before and after; the evaluation measures on more."""
_BATCH = 4


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
    from tasks.corpus.sampling import windows
    from tasks.display import Progress
    from tasks.moe import counts, device
    from tasks.moe.streamed import Streamed
    from tasks.partition import shapes
    from tasks.partition.construct import construct

    partition, seq_len = entry.partition, entry.pretrain.seq_len
    dense = Streamed(model_dir)
    shapes.require(dense.config, partition)
    for line in shapes.warnings(dense.config, partition):
        print(f"partition: warning: {line}", file=sys.stderr)
    validation = windows.validation(corpus_dir, seq_len=seq_len, count=VALIDATION_WINDOWS)
    sparse_layers = partition.sparse_layers(dense.layers)
    with Progress(len(sparse_layers), label="partition", unit="layer") as progress:
        made = construct(
            model_dir,
            corpus_dir,
            partition,
            seq_len=seq_len,
            folder=work,
            report=progress.advance,
        )
    started = time.perf_counter()
    moe = Streamed(work / "moe", device=device.default())
    dense_losses, moe_losses = (
        _losses(model, validation) for model in (Streamed(model_dir, device=device.default()), moe)
    )
    width = dense.config.intermediate_size
    served = {}
    for top_k in partition.elastic or ():
        moe.config.num_experts_per_tok = top_k
        losses = moe_losses if top_k == partition.top_k else _losses(moe, validation)
        ratio = _perplexity(losses) / _perplexity(dense_losses)
        served[str(top_k)] = {"ffn_active": partition.active(width, top_k=top_k), "perplexity_ratio": ratio}
    moe.config.num_experts_per_tok = partition.top_k
    made["seconds"]["validation loss"] = round(time.perf_counter() - started, 1)
    return (
        made
        | {
            "validation_loss": moe_losses,
            "perplexity": _perplexity(moe_losses),
            "dense": {"validation_loss": dense_losses, "perplexity": _perplexity(dense_losses)},
            "perplexity_ratio": _perplexity(moe_losses) / _perplexity(dense_losses),
            "validation_windows": {domain: len(ids) for domain, ids in validation.items()},
            "parameters": counts.parameters(moe.config),
            "sparse_layers": sparse_layers,
            "ffn_active": partition.active(width),
        }
        | ({"elastic": served} if served else {})
    )


def _losses(model: Streamed, validation: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats per predicted token of each domain; each layer is read once for all of them."""
    nats_B = model.nll(np.concatenate(list(validation.values())), batch=_BATCH)
    ends = np.cumsum([len(ids) for ids in validation.values()])[:-1]
    return {
        domain: float(nats.sum() / (len(ids) * (ids.shape[1] - 1)))
        for (domain, ids), nats in zip(validation.items(), np.split(nats_B, ends), strict=True)
    }


def _perplexity(losses: dict[str, float]) -> float:
    """exp of the mean over domains of the loss."""
    from tasks.moe.loss import perplexity

    return perplexity(sum(losses.values()) / len(losses))


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
        f"validation perplexity {dense:.2f} dense, {metrics['perplexity']:.2f} with {metrics['ffn_active']:.0%} of "
        f"the FFN active ({metrics['perplexity_ratio']:.2f} x); identity error {metrics['identity_error']:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

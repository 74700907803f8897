"""Estimate the domain weights of a pipeline.

    python -m tasks.mixture PIPELINE

Reads data/corpora/<corpus>/ and, for `reference_loss`, data/models/<model>/; writes runs/<pipeline>/mixture.json:
the weights, the method, and the evidence (the uniform and proportional mixes to compare with, tokens per domain,
epochs of the training budget, the domains whose share a cap on repetition lowered, reference losses).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tasks import scratch, settings
from tasks.mixture import methods


def run(pipeline: str) -> Path:
    """Write runs/<pipeline>/mixture.json and return its path. Raises ValueError when the settings do not fit.

    How long it took stands in mixture.time.json: what depends on the weights does not depend on the clock.
    """
    from tasks.corpus import manifest
    from tasks.corpus.sampling import windows

    loaded = settings.load()
    entry = loaded.pipeline(pipeline)
    corpus, model = Path("data/corpora") / entry.corpus, Path("data/models") / entry.model
    windows.require(corpus, "test", seq_len=entry.evaluate.seq_len)  # else only found when all is trained
    tokens = {name: domain.train.tokens for name, domain in manifest.load(corpus).trained.items()}
    problem = methods.Problem(
        tokens=tokens,
        weights=entry.mixture.weights,
        alpha=entry.mixture.alpha,
        budget=entry.pretrain.tokens,
        max_epochs=entry.mixture.max_epochs,
        corpus=corpus,
        model=model,
        seq_len=entry.evaluate.seq_len,
        windows=entry.mixture.windows,
        pipeline=pipeline,
        student=Path("runs") / pipeline / "moe",
        target=entry.mixture.targets(list(tokens)),
        proxy=entry.mixture.proxy,
        swarm=entry.mixture.swarm,
    )
    started = time.perf_counter()
    with scratch.workspace("mixture", pipeline):
        estimate = methods.estimate(entry.mixture.method, problem)
        evidence = {
            "tokens": tokens,
            "uniform": methods.normalise(methods.uniform(problem).weights),
            "proportional": methods.normalise(methods.proportional(problem).weights),
            **estimate.evidence,
        }
        target = Path("runs") / pipeline / "mixture.json"
        scratch.write_json(target, {"weights": estimate.weights, "method": entry.mixture.method, "evidence": evidence})
        taken = round(time.perf_counter() - started, 1)
        scratch.write_json(target.with_name("mixture.time.json"), {"seconds": taken})
    for name, weight in estimate.weights.items():
        cap = f", lowered to {entry.mixture.max_epochs:g} epochs" if name in evidence["capped"] else ""
        print(f"{name}: weight {weight:.4f} (proportional {evidence['proportional'][name]:.4f}{cap})")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.mixture", description="Estimate the domain weights.")
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    try:
        run(parser.parse_args().pipeline)
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"mixture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

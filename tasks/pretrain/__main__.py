"""Continually pre-train the split model of a pipeline.

    python -m tasks.pretrain PIPELINE [--discard]

Reads runs/<pipeline>/{moe/,mixture.json} and data/corpora/<corpus>/; writes runs/<pipeline>/{trained/,training/,
pretrain.json,loss.csv,validation.csv}. Stopped at any moment, even by kill -9, the same command goes on from the last
checkpoint and ends with the same weights and the same log. With --discard, it deletes the unfinished work instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tasks import scratch, settings
from tasks.pretrain import launch, outputs, resume, trackers
from tasks.pretrain.job import Job, TrainingError


def run(pipeline: str) -> Path:
    """Train `pipeline` and return runs/<pipeline>/trained.

    Raises:
        SettingsError, TrainingError, scratch.BusyError: with a message that says what mends it.
    """
    entry = settings.load().pipeline(pipeline)
    root, corpus = Path("runs") / pipeline, Path("data/corpora") / entry.corpus
    model, mixture, manifest = root / "moe", root / "mixture.json", corpus / "manifest.json"
    parent = Path("data/models") / entry.model
    needed = {
        parent / "config.json": "model",
        model / "config.json": "partition",
        mixture: "mixture",
        manifest: "corpus",
    }
    for path, stage in needed.items():
        if not path.exists():
            raise TrainingError(f"{path}: not found; run the stage `{stage}` first")
    inputs = {
        "model": scratch.digest(model),
        "mixture": _decided(mixture),
        "corpus": scratch.digest(manifest),
    }
    trackers.check(entry.pretrain.trackers)
    with resume.workspace(pipeline, params=entry.pretrain, inputs=inputs) as (workspace, notes):
        for note in notes:
            print(note, flush=True)
        job = Job(
            pipeline=pipeline,
            params=entry.pretrain,
            corpus=corpus,
            model=model,
            parent=parent,
            mixture=mixture,
            workspace=workspace,
        )
        launch.run(job)
        outputs.publish(job)
    return root / "trained"


def _decided(mixture: Path) -> str:
    """Digest of what training reads of mixture.json."""
    content = json.loads(mixture.read_text())
    evidence = {name: content["evidence"].get(name) for name in ("window_losses", "seq_len", "windows")}
    return scratch.fingerprint({"weights": content["weights"], "evidence": evidence})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.pretrain", description="Continually pre-train a pipeline.")
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    parser.add_argument("--discard", action="store_true", help="delete its unfinished training, and train nothing")
    arguments = parser.parse_args()
    pipeline = arguments.pipeline
    try:
        print(resume.discard(pipeline) if arguments.discard else run(pipeline))
    except (ValueError, TrainingError, scratch.BusyError, OSError) as error:
        print(f"pretrain {pipeline}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

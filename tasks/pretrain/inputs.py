"""What a run is trained from: where it is, and digests by which unfinished work is known again."""

from __future__ import annotations

import json
from pathlib import Path

from tasks import scratch
from tasks.pretrain.job import TrainingError
from tasks.settings import Pipeline


def digests(entry: Pipeline, *, model: Path, mixture: Path) -> dict[str, str]:
    """Digests of the model that is trained, the mixture and the corpus.

    Args:
        model: the checkpoint that training begins with.

    Raises:
        TrainingError: one of them, or the dense parent, is not there; the message names the stage that makes it.
    """
    manifest = Path("data/corpora") / entry.corpus / "manifest.json"
    needed = {
        Path("data/models") / entry.model / "config.json": "model",
        model / "config.json": "partition",
        mixture: "mixture",
        manifest: "corpus",
    }
    for path, stage in needed.items():
        if not path.exists():
            raise TrainingError(f"{path}: not found; run the stage `{stage}` first")
    return {"model": scratch.digest(model), "mixture": _decided(mixture), "corpus": scratch.digest(manifest)}


def _decided(mixture: Path) -> str:
    """Digest of what training reads of mixture.json."""
    content = json.loads(mixture.read_text())
    evidence = {name: content["evidence"].get(name) for name in ("window_losses", "seq_len", "windows")}
    return scratch.fingerprint({"weights": content["weights"], "evidence": evidence})

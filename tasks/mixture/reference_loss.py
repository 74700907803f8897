"""Reference losses: the loss of the dense parent on the validation text of every domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def measure(model_dir: Path, corpus_dir: Path, *, seq_len: int, windows: int) -> dict[str, Any]:
    """Validation loss of the dense parent in nats per predicted token, per domain and per window.

    The losses of the single windows are kept too: a run that moves the weights compares the student with its parent
    on the same windows, so the differences between windows cancel.

    Returns:
        reference_losses {domain: mean}, window_losses {domain: [one per window]}, seq_len, windows (asked for).
    """
    from tasks.corpus.sampling.windows import validation
    from tasks.moe import checkpoint
    from tasks.moe.loss import window_nll

    model = checkpoint.load(model_dir)
    losses: dict[str, list[float]] = {}
    for domain, ids_BL in validation(corpus_dir, seq_len=seq_len, count=windows).items():
        losses[domain] = (window_nll(model, ids_BL, batch=4) / (seq_len - 1)).tolist()
        print(f"{domain}: reference loss {sum(losses[domain]) / len(losses[domain]):.4f}", flush=True)
    return {
        "reference_losses": {domain: sum(values) / len(values) for domain, values in losses.items()},
        "window_losses": losses,
        "seq_len": seq_len,
        "windows": windows,
    }

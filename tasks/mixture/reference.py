"""Reference losses: what the dense parent makes of every domain's held-out text."""

from __future__ import annotations

from typing import Any

from tasks.mixture.methods import Problem


def measure(problem: Problem) -> dict[str, Any]:
    """Held-out loss of the dense parent in nats per predicted token, per domain and per window.

    The losses of the single windows are kept too: dynamic batch loading compares the student with its parent on the
    same windows, so the differences between windows cancel.

    Returns:
        reference_losses {domain: mean}, window_losses {domain: [one per window]}, seq_len, windows (asked for).
    """
    from tasks.corpus import windows
    from tasks.moe import checkpoint
    from tasks.moe.loss import window_nll

    model = checkpoint.load(problem.model)
    heldout = windows.heldout(problem.corpus, seq_len=problem.seq_len, count=problem.windows)
    losses: dict[str, list[float]] = {}
    for domain, ids_BL in heldout.items():
        losses[domain] = (window_nll(model, ids_BL, batch=4) / (problem.seq_len - 1)).tolist()
        print(f"{domain}: reference loss {sum(losses[domain]) / len(losses[domain]):.4f}", flush=True)
    return {
        "reference_losses": {domain: sum(values) / len(values) for domain, values in losses.items()},
        "window_losses": losses,
        "seq_len": problem.seq_len,
        "windows": problem.windows,
    }

"""Which windows make up the next batch: an integer state machine that no world size, restart or machine changes.

A batch is drawn in three steps:
1. Each domain's claim grows by weight x batch; domains get whole slots so that what each was served never differs from
   its claim by one slot or more (while weights stand still).
2. A domain serves its windows in an order that is a permutation per epoch: each once before any comes again.
3. The slots are permuted; rank r of W takes slots[r::W].

The state is `step` and, per domain, the windows served, the claim left over and the weight: a few hundred bytes, and
the batch at any step costs the same. Weights may change between any two batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from tasks.corpus.sampling import permutation
from tasks.corpus.sampling.packing import Packing
from tasks.corpus.sampling.weights import ONE, quantise

VERSION = 1
BLOCK = 1024  # windows of a domain that are looked up together, at little more than the cost of a batch's few
Slot = tuple[str, int]
Position = tuple[int, ...]


class Sampler:
    """Global batches of (domain, window) slots.

    Args:
        windows: windows that each domain has (`train_windows`).
        weights: share of each domain in a batch, normalised here.
        seed: other seeds, other orders.
        batch: slots per global batch.
        corpus_sha256: `Manifest.sha256`, so that a state isn't continued on another corpus.
        packing: what the windows were made with, so that a state isn't continued on others.

    Raises:
        ValueError: domains of `windows` and `weights` differ, or a domain with a weight has no window.
    """

    def __init__(
        self,
        windows: Mapping[str, int],
        *,
        weights: Mapping[str, float],
        seed: int,
        batch: int,
        corpus_sha256: str,
        packing: Packing = "concat",
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch = {batch} must be at least 1")
        self.domains = list(windows)
        self.seed, self.batch, self.corpus_sha256, self.packing = seed, batch, corpus_sha256, packing
        self.step = 0
        self._windows = list(windows.values())
        self._cursor = [0] * len(windows)  # windows served
        self._residual = [0] * len(windows)  # slots claimed and not served, times 2**32; sums to 0
        self._weights = [0] * len(windows)
        self._blocks: dict[int, tuple[tuple[int, int], list[int]]] = {}  # of each domain the last one looked up
        self.set_weights(weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Use other weights from the next batch on. Claims left over stay, except those of domains now at 0."""
        if set(weights) != set(self.domains):
            raise ValueError(f"weights are for {', '.join(weights)}; the sampler has {', '.join(self.domains)}")
        quantised = quantise([weights[domain] for domain in self.domains])
        for domain, weight, count in zip(self.domains, quantised, self._windows, strict=True):
            if weight and count < 1:
                raise ValueError(
                    f"domain {domain} has weight {weights[domain]} but not one whole training window; "
                    "give it weight 0, more text, or lower seq_len"
                )
        heaviest = quantised.index(max(quantised))
        for i, weight in enumerate(quantised):
            if not weight:
                self._residual[heaviest] += self._residual[i]
                self._residual[i] = 0
        self._weights = quantised

    @property
    def weights(self) -> dict[str, float]:
        """The weights in use."""
        return {domain: weight / ONE for domain, weight in zip(self.domains, self._weights, strict=True)}

    @property
    def windows(self) -> dict[str, int]:
        """Windows of each domain."""
        return dict(zip(self.domains, self._windows, strict=True))

    @property
    def position(self) -> Position:
        """What decides the batches to come: at equal positions a sampler gives the same."""
        return (self.step, *self._cursor, *self._residual, *self._weights)

    def next(self) -> list[Slot]:
        """The next global batch, [batch] of (domain, window index)."""
        slots = self.peek()
        self.skip()
        return slots

    def peek(self) -> list[Slot]:
        """What `next` would give."""
        counts, _ = self._apportion()
        ordered = [(self.domains[i], window) for i, count in enumerate(counts) for window in self._draw(i, count)]
        order = permutation.shuffled(self.batch, round_keys=permutation.key(self.seed, "slots", self.step))
        return [ordered[place] for place in order.tolist()]

    def skip(self) -> None:
        """Leave the next batch behind without drawing it."""
        counts, self._residual = self._apportion()
        self._cursor = [cursor + count for cursor, count in zip(self._cursor, counts, strict=True)]
        self.step += 1

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values."""
        return {
            "version": VERSION,
            "corpus_sha256": self.corpus_sha256,
            "packing": self.packing,
            "seed": self.seed,
            "batch": self.batch,
            "step": self.step,
            "domains": self.domains,
            "windows": self._windows,
            "cursor": list(self._cursor),
            "residual": list(self._residual),
            "weights": list(self._weights),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken.

        Raises:
            ValueError: the state is of another corpus, packing, seed, batch, sequence length or format; nothing is
                changed.
        """
        ours = self.state()
        saved = {"packing": "concat", **state}  # states were saved without it while there was no other
        for field, fix in _FIXED.items():
            if saved.get(field) != ours[field]:
                raise ValueError(
                    f"cannot resume the sampler: {field} is {ours[field]!r} now and was {saved.get(field)!r} "
                    f"in the saved state; {fix}"
                )
        self.step = state["step"]
        self._cursor, self._residual = list(state["cursor"]), list(state["residual"])
        self._weights = list(state["weights"])

    @classmethod
    def load(
        cls, state: Mapping[str, Any], *, windows: Mapping[str, int], corpus_sha256: str, packing: Packing = "concat"
    ) -> Self:
        """A sampler that continues from `state` on the corpus at hand. Raises ValueError as `restore` does."""
        weights = {domain: weight / ONE for domain, weight in zip(state["domains"], state["weights"], strict=True)}
        sampler = cls(
            windows,
            weights=weights,
            seed=state["seed"],
            batch=state["batch"],
            corpus_sha256=corpus_sha256,
            packing=packing,
        )
        sampler.restore(state)
        return sampler

    def _apportion(self) -> tuple[list[int], list[int]]:
        """Slots of each domain in this batch, and the residuals after it.

        A domain's j-th slot may be served once its claim exceeds j - 1 and must be once it reaches j. Serving the
        earliest of these deadlines first keeps all of them (unit jobs on `batch` machines; Tijdeman 1980 shows that
        a schedule exists), so served - claimed stays strictly within (-1, 1).
        """
        claims = [r + w * self.batch for r, w in zip(self._residual, self._weights, strict=True)]
        counts = [max(claim // ONE, 0) for claim in claims]
        left = self.batch - sum(counts)
        optional = sorted((self._deadline(i, claim), i) for i, claim in enumerate(claims) if claim % ONE and claim > 0)
        for _, i in optional[: max(left, 0)]:
            counts[i] += 1
        for _ in range(-left):  # only right after a change of weights: put off the slots that are least overdue
            i = min((i for i, n in enumerate(counts) if n), key=lambda i: (claims[i] - counts[i] * ONE, i))
            counts[i] -= 1
        return counts, [claim - n * ONE for claim, n in zip(claims, counts, strict=True)]

    def _deadline(self, i: int, claim: int) -> int:
        """Batches until the slot that domain i has claimed in part is claimed in full."""
        speed = self._weights[i] * self.batch
        return -((claim % ONE - ONE) // speed) if speed else 0

    def _draw(self, i: int, count: int) -> list[int]:
        """The next `count` windows of domain i, in the order of its epochs."""
        windows: list[int] = []
        n, cursor = self._windows[i], self._cursor[i]
        while count:
            epoch, place = divmod(cursor, n)
            block, start = divmod(place, BLOCK)
            taken = self._block(i, epoch, block)[start : start + count]
            windows += taken
            cursor, count = cursor + len(taken), count - len(taken)
        return windows

    def _block(self, i: int, epoch: int, block: int) -> list[int]:
        """The windows at places block * BLOCK and on of domain i's order in an epoch."""
        known, windows = self._blocks.get(i, (None, []))
        if known != (epoch, block):
            n = self._windows[i]
            places = np.arange(block * BLOCK, min((block + 1) * BLOCK, n), dtype=np.uint64)
            round_keys = permutation.key(self.seed, self.domains[i], epoch)
            windows = permutation.permute(places, n, round_keys=round_keys).tolist()
            self._blocks[i] = ((epoch, block), windows)
        return windows


_FIXED = {
    "version": "it was saved by another version of the sampler: start the run again",
    "corpus_sha256": "the corpus changed: train on the one the run began with, or start the run again",
    "packing": "set it back, or start the run again",
    "seed": "set it back, or start the run again",
    "batch": "set it back, or start the run again",
    "domains": "the corpus has other domains: start the run again",
    "windows": "seq_len changed: set it back, or start the run again",
}

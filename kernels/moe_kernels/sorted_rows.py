"""The sorted rows of a call of :mod:`moe_kernels.sorted_path`, in chunks of whole experts.

Shapes: T tokens, D hidden, F width of one expert, E experts, K top-k, M = T*K rows sorted by expert, P those with
copies, C rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .routing import Routing

# Whole experts are taken until their activations have so many elements, or are so many rows: enough to hide the cost
# of calling an operator, little enough for the cache.
_CHUNK_ELEMENTS, _CHUNK_ROWS = 2**16, 1024
# With AMX, oneDNN reads a column's run in bf16 up to the next multiple of this many rows, and multiplies what lies
# past the end by zero: NaN and infinity must not lie there.
_TAIL = 32
# oneDNN, which multiplies in half precision, compiles a kernel for every number of rows that it meets (0.6 ms) and
# keeps 1,024 of them. The rows of an expert differ from call to call. Rounded up to a multiple of 8, and of about a
# sixteenth of themselves, they are few numbers.
_LEAST_STEP, _STEP_SHARE = 8, 16


def hidden_rows(rows: int, *, experts: int, dtype: torch.dtype, device: str) -> int:
    """How many rows the pre-activations of ``rows`` routed ones have room for; see Rows."""
    if device != "cpu" or dtype.itemsize > 2:
        return rows
    return rows + rows // _STEP_SHARE + (_LEAST_STEP - 1) * experts


def rounded(rows: int) -> int:
    """The number of rows that ``rows`` of an expert become in half precision on a CPU."""
    step = max(_LEAST_STEP, 1 << max(rows // _STEP_SHARE, 1).bit_length() - 1)
    return -(-rows // step) * step


@dataclass(frozen=True)
class Chunk:
    """Sorted rows ``start:stop``: those of whole experts, each with its slice of the chunk."""

    start: int
    stop: int
    experts: list[tuple[int, slice]]
    token_C: Tensor | None
    weight_C1: Tensor | None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def take(self, rows_TD: Tensor, *, out: Tensor) -> Tensor:
        """The rows of the chunk, gathered into ``out`` unless they came sorted."""
        if self.token_C is None:
            return rows_TD[self.start : self.stop]
        return torch.index_select(rows_TD, 0, self.token_C, out=out[: self.size])

    def scale(self, act_CF: Tensor) -> None:
        """Multiplies each row by its routing weight, in place."""
        if self.weight_C1 is not None:
            act_CF.mul_(self.weight_C1)


class Rows:
    """The sorted rows of a call.

    In half precision on a CPU each expert's are followed by copies of its first, up to a round number. A copy has
    the routing weight 0 and no place in ``inverse_TK``: it changes neither the output nor a gradient.
    """

    def __init__(self, x_TD: Tensor, routing: Routing, *, weights_TK: Tensor | None, width: int) -> None:
        self.bounds: list[int] = routing.offset_E1.tolist()
        self.inverse_TK = routing.inverse_TK
        self.total = x_TD.shape[0] if routing.flat_M is None else routing.flat_M.numel()
        self.token_M = self.weight_M1 = None
        if routing.flat_M is not None:
            flat_M, copy_M = routing.flat_M.long(), None
            room = hidden_rows(self.total, experts=routing.experts, dtype=x_TD.dtype, device=x_TD.device.type)
            if room > self.total:
                flat_M, copy_M = self._pad(flat_M)
                self.total = room
            self.token_M = flat_M // max(routing.top_k, 1)
            if weights_TK is not None:
                weight_M = weights_TK.reshape(-1)[flat_M].to(x_TD.dtype)
                self.weight_M1 = (weight_M if copy_M is None else weight_M.masked_fill_(copy_M, 0)).unsqueeze(1)
        self.cuts = self._cut(min(_CHUNK_ROWS, _CHUNK_ELEMENTS // width))
        most = max((self.bounds[last] - self.bounds[first] for first, last in self.cuts), default=0)
        self.most = -(-(most + _TAIL) // 256) * 256  # few different strides; see sorted_path._block and _TAIL

    def _pad(self, flat_M: Tensor) -> tuple[Tensor, Tensor]:
        """``flat_M`` with the copies, and which rows are copies. ``bounds`` and ``inverse_TK`` then count them.

        The rows of absent experts are left out: they follow those of the last expert.
        """
        counts = [stop - start for start, stop in pairwise(self.bounds)]
        sizes = [rounded(count) for count in counts]
        old_E1, new_E1 = torch.tensor(self.bounds), torch.tensor([0, *accumulate(sizes)])
        expert_P = torch.repeat_interleave(torch.tensor(sizes))
        place_P = torch.arange(len(expert_P)) - new_E1[expert_P]
        copy_P = place_P >= torch.tensor(counts)[expert_P]
        shift_M = torch.repeat_interleave(new_E1 - old_E1, torch.tensor([*counts, self.total - self.bounds[-1]]))
        assert self.inverse_TK is not None
        self.inverse_TK = self.inverse_TK + shift_M[self.inverse_TK]
        self.bounds = new_E1.tolist()
        return flat_M[old_E1[expert_P] + place_P.masked_fill_(copy_P, 0)], copy_P

    def _cut(self, rows: int) -> list[tuple[int, int]]:
        """Ranges of experts with ``rows`` rows or more each, but for the last."""
        cuts, first = [], 0
        for expert, bound in enumerate(self.bounds):
            if bound - self.bounds[first] >= max(rows, 1) or (
                expert == len(self.bounds) - 1 and bound > self.bounds[first]
            ):
                cuts.append((first, expert))
                first = expert
        return cuts

    def chunks(self) -> Iterator[Chunk]:
        for first, last in self.cuts:
            start, stop = self.bounds[first], self.bounds[last]
            experts = [
                (expert, slice(self.bounds[expert] - start, self.bounds[expert + 1] - start))
                for expert in range(first, last)
                if self.bounds[expert] < self.bounds[expert + 1]
            ]
            token_C = None if self.token_M is None else self.token_M[start:stop]
            yield Chunk(start, stop, experts, token_C, None if self.weight_M1 is None else self.weight_M1[start:stop])

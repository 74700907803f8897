"""KL divergence of two next-token distributions, without a second tensor of all logits in fp32.

The gradient by the student's logits is the difference of two softmaxes. It is computed in forward, where both are at
hand, a few tokens at a time in fp32, and kept in the dtype of the logits: as large as they are, and all that backward
needs.

Shapes: B windows, L tokens of a window, T = B * L, C tokens at a time, V vocabulary, D hidden, N logits kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_CACHE = 1 << 19  # elements that are worked on at once on a CPU: 2 MiB in fp32, what stays near a core
_LAUNCH = 1 << 24  # and on a device, where a launch has to pay
_PRODUCT = 128  # tokens that share one reading of the head's weight on a CPU


class Parent(Protocol):
    """The parent's distributions of T tokens."""

    def compare(self, tokens: slice, logits_CV: torch.Tensor) -> torch.Tensor:
        """KL(parent | student) of some tokens, fp32 [C], in nats.

        `logits_CV` are the student's, divided by the temperature, fp32. Overwritten with softmax(student) - parent.
        """


def kl(
    logits_BLV: torch.Tensor, parent: Parent, *, counted_BL: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """temperature ** 2 * KL(parent | student) of each window, fp32 [B]: the mean over its counted tokens, 0 without any.

    The factor keeps the size of the gradient as the temperature grows (arXiv 1503.02531, section 2).

    Args:
        logits_BLV: the student's; gets the gradient.
        parent: at the same temperature.
        counted_BL: bool, the tokens that count.
    """
    kl_B: torch.Tensor = _Kl.apply(logits_BLV, parent, counted_BL, temperature)
    return kl_B


class Whole:
    """A parent that is in memory: its logits are made a few tokens at a time.

    Args:
        hidden_TD: its states before the head.
        head: states [C, D] to logits [C, V].
    """

    def __init__(
        self, hidden_TD: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], *, temperature: float
    ) -> None:
        self._hidden_TD, self._head, self._temperature = hidden_TD, head, temperature
        self._start, self._logits = 0, hidden_TD.new_empty(0, 0)

    def compare(self, tokens: slice, logits_CV: torch.Tensor) -> torch.Tensor:
        parent_CV = self._take(tokens).float()
        if self._temperature != 1.0:
            parent_CV = parent_CV / self._temperature
        top, parent_top = logits_CV.amax(1), parent_CV.amax(1)
        p_CV, q_CV = torch.softmax(parent_CV, 1), torch.softmax(logits_CV, 1)
        # log-sum-exps from what the softmaxes know: the largest logit has the probability 1 / sum exp(z - top)
        shift_C = (top - q_CV.amax(1).log()) - (parent_top - p_CV.amax(1).log())
        gap_CV = torch.sub(parent_CV, logits_CV)
        kl_C = torch.bmm(p_CV[:, None], gap_CV[:, :, None]).flatten() + shift_C
        torch.sub(q_CV, p_CV, out=logits_CV)
        return kl_C

    def _take(self, tokens: slice) -> torch.Tensor:
        """The parent's logits of some tokens, out of a product for more of them: each reads all of the head's weight."""
        if tokens.stop > self._start + len(self._logits):
            self._start = tokens.start
            self._logits = self._head(self._hidden_TD[tokens.start : max(tokens.stop, tokens.start + _PRODUCT)])
        return self._logits[tokens.start - self._start : tokens.stop - self._start]


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BLV: torch.Tensor, parent: Parent, counted_BL: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        logits_TV = logits_BLV.flatten(0, 1)
        tokens, vocabulary = logits_TV.shape
        chunk = max(1, (_CACHE if logits_TV.device.type == "cpu" else _LAUNCH) // vocabulary)
        gradient_TV = torch.empty_like(logits_TV)
        kl_T = torch.empty(tokens, dtype=torch.float32, device=logits_TV.device)
        for start in range(0, tokens, chunk):
            some = slice(start, min(start + chunk, tokens))
            scaled_CV = logits_TV[some].to(torch.float32, copy=True)
            if temperature != 1.0:
                scaled_CV /= temperature
            kl_T[some] = parent.compare(some, scaled_CV)
            gradient_TV[some] = scaled_CV
        ctx.gradient_TV, ctx.counted_BL, ctx.temperature = gradient_TV, counted_BL, temperature
        kl_BL = kl_T.view_as(counted_BL).masked_fill(~counted_BL, 0.0)
        return kl_BL.sum(1) / counted_BL.sum(1).clamp(min=1) * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient_TV, counted_BL = ctx.gradient_TV, ctx.counted_BL
        if gradient_TV is None:
            raise RuntimeError("the divergence keeps its gradient for one backward pass, and this is the second")
        ctx.gradient_TV = None  # it becomes the gradient itself, in place
        weight_BL = (grads[0] * ctx.temperature / counted_BL.sum(1).clamp(min=1))[:, None] * counted_BL
        gradient_TV *= weight_BL.view(-1, 1)
        return gradient_TV.view(*counted_BL.shape, -1), None, None, None

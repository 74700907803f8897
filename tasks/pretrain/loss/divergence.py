"""Cross-entropy and KL divergence from a parent in one pass over the student's logits.

Both gradients are differences of softmaxes. Their weighted sum is computed in forward, a few tokens at a time in fp32,
and kept in the dtype of the logits: one tensor of their size, which backward scales. torch's own formulas hold eight
of twice the size.

Shapes: B windows, L tokens of a window, T = B * L, C tokens at a time, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from tasks.corpus.sampling.loader import IGNORED

_CACHE = 1 << 18  # elements processed at once on a CPU: 1 MiB in fp32, so that a few such tensors stay in its cache
_LAUNCH = 1 << 24  # and on a device, where each launch has a cost
_PRODUCT = 512  # tokens that share one reading of the head's weight, which oneDNN repacks each time


class Parent(Protocol):
    """The parent's distributions of T tokens, at some temperature."""

    def compare(
        self, tokens: slice, logits_CV: torch.Tensor, *, q_CV: torch.Tensor, norm_C: torch.Tensor, share: float
    ) -> torch.Tensor:
        """KL(parent | student) of some tokens, fp32 [C], in nats.

        Args:
            logits_CV: the student's over the temperature, fp32.
            q_CV: their softmax. Overwritten with (1 - share) * q + share * (gradient of KL by the logits).
            norm_C: their log-sum-exp.
        """


def losses(
    logits_BLV: torch.Tensor,
    target_BL: torch.Tensor,
    parent: Parent,
    *,
    cross_entropy: float,
    kl: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and temperature ** 2 * KL(parent | student) of each window, fp32 [B] each, in nats.

    Each is the sum over the window's tokens with a target, 0 without any. The factor keeps the size of the gradient
    as the temperature grows (arXiv 1503.02531, section 2).

    Args:
        logits_BLV: the student's; they get the gradient.
        target_BL: int64, IGNORED where a token doesn't count.
        parent: at the same temperature.
        cross_entropy, kl: the coefficients by which the caller multiplies the two, >= 0 and > 0. Backward raises
            RuntimeError for other proportions, because only their joint gradient is kept.
    """
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _Losses.apply
    return apply(logits_BLV, target_BL, parent, (cross_entropy, kl), temperature)


class Resident:
    """A parent in memory; its logits are computed a few tokens at a time.

    Args:
        hidden_TD: its states before the head.
        head: states [C, D] to logits [C, V], without a graph.
    """

    def __init__(
        self, hidden_TD: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], *, temperature: float
    ) -> None:
        self._hidden_TD, self._head, self._temperature = hidden_TD, head, temperature
        self._start, self._logits = 0, hidden_TD.new_empty(0, 0)

    def compare(
        self, tokens: slice, logits_CV: torch.Tensor, *, q_CV: torch.Tensor, norm_C: torch.Tensor, share: float
    ) -> torch.Tensor:
        parent_CV = _scaled(self._take(tokens), self._temperature)
        p_CV = torch.softmax(parent_CV, 1)
        kl_C = norm_C - _norm(parent_CV, p_CV)
        parent_CV -= logits_CV
        kl_C += (p_CV * parent_CV).sum(1)  # a batched product of vectors takes torch four times as long
        torch.sub(q_CV, p_CV, alpha=share, out=q_CV)
        return kl_C

    def _take(self, tokens: slice) -> torch.Tensor:
        """The parent's logits of some tokens, from a product for more: each reads all of the head's weight."""
        if tokens.stop > self._start + len(self._logits):
            self._start = tokens.start
            self._logits = self._head(self._hidden_TD[tokens.start : max(tokens.stop, tokens.start + _PRODUCT)])
        return self._logits[tokens.start - self._start : tokens.stop - self._start]


class Kept:
    """A parent of which each token's N most likely successors are kept, and the probability of all others together.

    The divergence is that of N + 1 outcomes: at most the full one, and equal to it at N = V. How the student spreads
    its probability over the others is left alone.

    Args:
        ids_TN: the successors, int64.
        logs_TN: logs of their probabilities at the temperature, fp32.
        rest_T: log of that of the others, fp32; -inf where there are none.
    """

    def __init__(self, ids_TN: torch.Tensor, logs_TN: torch.Tensor, rest_T: torch.Tensor) -> None:
        self._ids_TN = ids_TN
        every = torch.cat([logs_TN, rest_T[:, None]], 1)
        self._logs = torch.log_softmax(every, 1)  # they were rounded, and need not sum to 1

    def compare(
        self, tokens: slice, logits_CV: torch.Tensor, *, q_CV: torch.Tensor, norm_C: torch.Tensor, share: float
    ) -> torch.Tensor:
        ids_CN, logs = self._ids_TN[tokens], self._logs[tokens]
        q_CN = q_CV.gather(1, ids_CN)
        rest_C1 = q_CV.scatter_(1, ids_CN, 0.0).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        own = torch.cat([logits_CV.gather(1, ids_CN) - norm_C[:, None], rest_C1.log()], 1)
        p = logs.exp()
        q_CV *= 1 - share * p[:, -1:] / rest_C1
        q_CV.scatter_(1, ids_CN, q_CN - share * p[:, :-1])
        return (p * (logs - own)).masked_fill(p == 0, 0.0).sum(1)  # 0 log 0 = 0; NaN stays


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_BLV: torch.Tensor,
        target_BL: torch.Tensor,
        parent: Parent,
        coefficients: tuple[float, float],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV, target_T = logits_BLV.flatten(0, 1), target_BL.flatten()
        counted_T = target_T != IGNORED
        target_T = target_T.where(counted_T, 0)
        tokens, vocabulary = logits_TV.shape
        chunk = max(1, (_CACHE if logits_TV.device.type == "cpu" else _LAUNCH) // vocabulary)
        share = coefficients[1] * temperature / (coefficients[0] + coefficients[1] * temperature)
        gradient_TV = torch.empty_like(logits_TV)
        nats_T, kl_T = torch.empty(2, tokens, dtype=torch.float32, device=logits_TV.device)
        for start in range(0, tokens, chunk):
            some = slice(start, min(start + chunk, tokens))
            own_CV, target_C1 = _scaled(logits_TV[some], 1.0), target_T[some, None]
            q_CV = torch.softmax(own_CV, 1)
            norm_C = _norm(own_CV, q_CV)
            nats_T[some] = norm_C - own_CV.gather(1, target_C1)[:, 0]
            if temperature == 1.0:
                kl_T[some] = parent.compare(some, own_CV, q_CV=q_CV, norm_C=norm_C, share=share)
            else:
                own_CV /= temperature
                soft_CV = torch.softmax(own_CV, 1)
                norm_C = _norm(own_CV, soft_CV)
                kl_T[some] = parent.compare(some, own_CV, q_CV=soft_CV, norm_C=norm_C, share=1.0)
                q_CV.lerp_(soft_CV, share)
            q_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, share - 1.0, dtype=torch.float32))
            gradient_TV[some] = q_CV
        counted_BL = counted_T.view_as(target_BL)
        ctx.gradient_TV, ctx.counted_BL = gradient_TV, counted_BL
        ctx.coefficients, ctx.temperature = coefficients, temperature
        nats_B, kl_B = (x_T.view_as(target_BL).masked_fill(~counted_BL, 0.0).sum(1) for x_T in (nats_T, kl_T))
        return nats_B, kl_B * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_TV, counted_BL, (cross_entropy, kl) = ctx.gradient_TV, ctx.counted_BL, ctx.coefficients
        if gradient_TV is None:
            raise RuntimeError("the gradient is kept for one backward pass, and this is the second")
        ctx.gradient_TV = None  # what was kept becomes what is returned, in place
        unit_B = grads[1] / kl
        if not torch.allclose(grads[0], unit_B * cross_entropy, rtol=1e-4, atol=0.0):
            raise RuntimeError(
                f"cross-entropy and KL were to be weighted as {cross_entropy} to {kl}; their gradients are "
                f"{grads[0].tolist()} and {grads[1].tolist()}"
            )
        unit_B = unit_B * (cross_entropy + kl * ctx.temperature)
        weight_T1 = (unit_B[:, None] * counted_BL).view(-1, 1)
        chunk = max(1, _CACHE // gradient_TV.shape[1]) if gradient_TV.device.type == "cpu" else len(gradient_TV)
        for some in (slice(start, start + chunk) for start in range(0, len(gradient_TV), chunk)):
            # in fp32 and back, which is quicker on a CPU than torch's product of bfloat16
            gradient_TV[some] = gradient_TV[some].float() * weight_T1[some]
        return gradient_TV.view(*counted_BL.shape, -1), None, None, None, None


def _scaled(logits_CV: torch.Tensor, temperature: float) -> torch.Tensor:
    """A copy in fp32, over the temperature."""
    scaled = logits_CV.to(torch.float32, copy=True)
    return scaled if temperature == 1.0 else scaled.div_(temperature)


def _norm(logits_CV: torch.Tensor, softmax_CV: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp [C], from what the softmax knows: the largest logit has the probability exp(logit - log-sum-exp)."""
    return logits_CV.amax(1) - softmax_CV.amax(1).log()

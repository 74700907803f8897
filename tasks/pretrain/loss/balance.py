"""Load-balancing losses, and the selection bias that balances without a loss.

Each is computed over the tokens of one micro-batch on one rank, without padding. DeepSpeed averages over micro-batches
and ranks. `switch`, `global_batch` and the z-loss are means over the sparse layers, so coefficients do not depend on
the depth; `mixtral` is one loss over all layers joined, as in transformers; `cv2` is the sum over the layers, as in
LLaMA-MoE.

In transformers f sums to K, so `mixtral` is K times `switch` where all layers route alike: the router_aux_loss_coef c
of a stock config is the coefficient K * c here.

Shapes: T tokens, K experts per token, E routed experts, L sparse layers, R ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.moe import counts, gate, routing
from tasks.moe.routing import Routed
from tasks.pretrain.hook import Hook, Step
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tasks.pretrain.step_result import StepResult


class BalanceHook(Hook):
    """Counts the load of a step, moves the biases after it and keeps them in checkpoints; no balancer, no work."""

    name = "balance"

    def __init__(self, balancer: Balancer | None) -> None:
        self._balancer = balancer

    def before_step(self, step: Step) -> None:
        if self._balancer:
            self._balancer.begin(top_k=step.top_k)

    def after_step(self, step: Step, result: StepResult, *, sound: bool) -> None:
        if self._balancer and sound:
            self._balancer.end()

    def state(self) -> list[list[float]]:
        """The biases of the routers' choice; [] without."""
        return gate.biases(self._balancer.model) if self._balancer else []

    def restore(self, state: list[list[float]]) -> None:
        if self._balancer and state:
            gate.set_biases(self._balancer.model, state)


class Balancer:
    """Balances one model through a run. Every rank has one and makes the same calls in order.

    Per optimizer step: `begin`, `losses` for each micro-batch, `end` after the optimizer has stepped. A skipped step
    has no `end`.
    """

    def __init__(self, params: Pretrain, model: nn.Module) -> None:
        """Args: model: with its biases already (tasks/moe/gate.py, add_bias) if params.balance.loss is `bias`."""
        import torch

        self._settings = params.balance
        self.model: Any = getattr(model, "module", model)
        sizes = counts.experts(self.model.config)
        self._experts, self._top_k = sizes["experts"], sizes["top_k"]
        device = next(self.model.parameters()).device
        self._mine_LE = torch.zeros(len(sizes["layers"]), self._experts, dtype=torch.int64, device=device)
        self._all_LE = torch.zeros_like(self._mine_LE)

    @property
    def load_LE(self) -> NDArray[np.int64]:
        """This rank's tokens per layer and expert in this step, without padding: int64 [L, E]."""
        return np.asarray(self._mine_LE.cpu().numpy())

    def begin(self, *, top_k: int | None = None) -> None:
        """Start a new optimizer step, in which a token passes `top_k` experts; the model's usual number if None."""
        self._top_k = top_k or counts.experts(self.model.config)["top_k"]
        self._mine_LE.zero_()
        self._all_LE.zero_()

    def losses(self, routed: list[Routed], *, real_T: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The parts of one micro-batch's loss that act on the routers.

        Args:
            routed: what `routing.record` gives for its forward pass; [] for a dense model.
            real_T: bool; False for padding. None where there is none.

        Returns:
            `balance` and `z` if the settings ask for them: fp32 scalars with gradients, times their coefficients.
        """
        import torch

        if not routed:
            return {}
        counts_LE = torch.stack([_count(each.chosen_TK, self._experts, real_T) for each in routed])
        self._mine_LE += counts_LE
        parts = {}
        if (balance := self._balance(routed, counts_LE, real_T)) is not None:
            parts["balance"] = self._settings.coefficient * balance
        if self._settings.z_loss:
            parts["z"] = self._settings.z_loss * z_loss(routed, real_T=real_T)
        return parts

    def _balance(
        self, routed: list[Routed], counts_LE: torch.Tensor, real_T: torch.Tensor | None
    ) -> torch.Tensor | None:
        import torch

        match self._settings.loss:
            case "switch":
                return switch(routed, counts_LE, tokens=counts_LE[0].sum() / self._top_k, real_T=real_T)
            case "global_batch":
                here_LE, ranks = _sum_over_ranks(counts_LE)
                self._all_LE += here_LE
                tokens = here_LE[0].sum() / self._top_k / ranks
                return switch(routed, self._all_LE, tokens=tokens, real_T=real_T)
            case "cv2":
                layers = zip(routed, counts_LE, strict=True)
                return torch.stack([cv2(each, count_E, real_T=real_T) for each, count_E in layers]).sum()
            case "mixtral":
                from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

                logits: Any = tuple(each.logits_TE for each in routed)
                return torch.as_tensor(load_balancing_loss_func(logits, self._experts, self._top_k, real_T))
            case _:
                return None

    def end(self) -> None:
        """Update the biases with the loss `bias`; all ranks must call it.

        b += u sign(mean - count) with the counts of the whole step, u the coefficient (arXiv 2408.15664, algorithm 1).
        Then b is centred, which changes no choice and keeps b from drifting.
        """
        if self._settings.loss != "bias":
            return
        counts_LE = _sum_over_ranks(self._mine_LE)[0].double()
        toward_LE = (counts_LE.mean(1, keepdim=True) - counts_LE).sign()
        for router, toward_E in zip(routing.routers(self.model), toward_LE, strict=True):
            bias_E: Any = router.selection_bias
            bias_E += self._settings.coefficient * toward_E.float()
            bias_E -= bias_E.mean()


def attach_routers(model: nn.Module, params: Pretrain) -> None:
    """Attach the noise or the bias of the settings to the routers of a sparse model; leave a dense model alone."""
    if not counts.experts(model.config)["experts"]:
        return
    if params.noise:
        gate.add_noise(model)
    if params.balance.loss == "bias":
        gate.add_bias(model)


def switch(
    routed: list[Routed], counts_LE: torch.Tensor, *, tokens: torch.Tensor, real_T: torch.Tensor | None
) -> torch.Tensor:
    """E sum_e f_e P_e (arXiv 2101.03961, eq. 4 to 6, for K experts a token), mean over the layers; 1 when even.

    f is the share of the assignments in counts_LE, without a gradient; P the probability of the softmax over all
    experts, summed over the real tokens and divided by `tokens`. With the counts of one micro-batch and its tokens
    this is Switch's loss.

    With the counts of the global batch and its mean number of tokens on a rank, the mean over the ranks is the loss of
    the global batch (arXiv 2501.11873), whatever each rank's padding. Counts accumulate over the micro-batches of a
    step, so this is exact with one micro-batch a rank, and an approximation with several, of which the last has all.
    """
    import torch

    probability_LE = torch.stack([_sum(each.logits_TE.float().softmax(1), real_T) for each in routed])
    share_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)
    return counts_LE.shape[1] * (share_LE * probability_LE).sum(1).mean() / tokens.clamp(min=1)


def z_loss(routed: list[Routed], *, real_T: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens and layers of logsumexp(z)^2, z the logits without noise and bias (arXiv 2202.08906, eq. 5)."""
    import torch

    squares_TL = torch.stack([each.clean_TE.float().logsumexp(1).square() for each in routed], dim=1)
    tokens = len(squares_TL) if real_T is None else real_T.sum().clamp(min=1)
    return _sum(squares_TL, real_T).mean() / tokens


def cv2(routed: Routed, count_E: torch.Tensor, *, real_T: torch.Tensor | None) -> torch.Tensor:
    """cv^2(importance) + cv^2(load) of one layer (arXiv 1701.06538, eq. 6, 7, 11), cv^2 = variance / mean^2, unbiased.

    Importance is the sum of an expert's weights.
    """
    import torch

    zero_TE = torch.zeros_like(routed.logits_TE, dtype=torch.float32)
    importance_TE = zero_TE.scatter(1, routed.chosen_TK, routed.weights_TK.float())
    return _cv2(_sum(importance_TE, real_T)) + _cv2(load(routed, count_E, real_T=real_T))


def load(routed: Routed, count_E: torch.Tensor, *, real_T: torch.Tensor | None) -> torch.Tensor:
    """Expected tokens of each expert if the noise of that one logit were drawn again (arXiv 1701.06538, eq. 8 to 10).

    The sum over tokens of Phi((clean - threshold) / std). The threshold is the k-th largest of the other noisy logits:
    the k+1-th of all for an expert that was chosen, the k-th for another. LLaMA-MoE's code compares the noise instead
    of the noisy logits with it, and so often takes the wrong one. Without noise, or if all experts are chosen, the
    result is the count.
    """
    import torch

    if routed.std_TE is None or routed.chosen_TK.shape[1] == len(count_E):
        return count_E.float()
    noisy_TE = routed.logits_TE.float()
    chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(1, routed.chosen_TK, True)
    last_T1 = noisy_TE.gather(1, routed.chosen_TK).amin(1, keepdim=True)
    next_T1 = noisy_TE.masked_fill(chosen_TE, -torch.inf).amax(1, keepdim=True)
    threshold_TE = torch.where(chosen_TE, next_T1, last_T1)
    margin_TE = (routed.clean_TE.float() - threshold_TE) / routed.std_TE.float()
    return _sum(torch.special.ndtr(margin_TE), real_T)


def _cv2(value_E: torch.Tensor) -> torch.Tensor:
    if len(value_E) == 1:
        return value_E.sum() * 0
    return value_E.var() / (value_E.mean().square() + 1e-10)


def _count(chosen_TK: torch.Tensor, experts: int, real_T: torch.Tensor | None) -> torch.Tensor:
    """Tokens of each expert, int64 [E]; bincount would wait for the device."""
    import torch

    ones_TK = torch.ones_like(chosen_TK) if real_T is None else real_T[:, None].expand_as(chosen_TK).long()
    zero_E = torch.zeros(experts, dtype=torch.int64, device=chosen_TK.device)
    return zero_E.scatter_add(0, chosen_TK.flatten(), ones_TK.flatten())


def _sum(value_TX: torch.Tensor, real_T: torch.Tensor | None) -> torch.Tensor:
    """Sum over the real tokens."""
    return value_TX.sum(0) if real_T is None else value_TX.masked_fill(~real_T[:, None], 0).sum(0)


def _sum_over_ranks(counts_LE: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The counts of all ranks in one all-reduce, and the number of ranks."""
    from torch import distributed

    total_LE = counts_LE.clone()
    if not distributed.is_initialized():
        return total_LE, 1
    distributed.all_reduce(total_LE)
    return total_LE, distributed.get_world_size()

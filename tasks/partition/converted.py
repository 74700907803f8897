"""One converted FFN on the calibration tokens, computed from the dense one's neurons: experts are weights over them.

Here the router gets its size, the routed experts their scale, and the down-projection its refit.

Shapes: T tokens, D hidden, N neurons of the dense FFN, E routed experts, G = E + 1 groups, the last being the shared
experts, K experts per token.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tasks.partition import router
from tasks.partition.layer import CHUNK, Layer, Sizes
from tasks.settings import Partition

ADDED = 0.05
"""Most that unequal weights of the chosen experts may add to a layer's squared error, as a share of it."""
RIDGE = 0.3
"""Ridge penalty on the change of the down-projection, as a share of the mean diagonal of its inputs' moments."""
_PROBE = 0.01  # share of the router's size at which its effect on the weights is still linear
_TEMPER_TOKENS = 2 * CHUNK


def sum_of_weights(partition: Partition, width: int) -> float:
    """What the routed experts' weights sum to (settings.Partition.scale), before any calibration.

    The dense FFN is the plain sum of its slices. A partition's chosen experts therefore want the weight 1 each; where
    copies are chosen whole, the slices of all chosen copies together want the weight that one copy has.
    """
    experts, top_k = partition.experts, partition.top_k
    unit = width / partition.check_width(width) if partition.method == "copy" else top_k
    return {
        "unit": float(unit),
        "paper": experts / top_k,
        "mean": float(experts),
        "variance": math.sqrt(top_k * experts),
        "calibrated": float(unit),
    }[partition.scale]


class Converted:
    """A dense FFN, its experts, a router and the routed experts' scale, of which the last two may be fitted."""

    def __init__(self, layer: Layer, experts_EF: np.ndarray, *, sizes: Sizes, router_ED: torch.Tensor, scale: float):
        self._layer, self._sizes = layer, sizes
        self.router_ED, self.scale, self.down_DN = router_ED, scale, layer.down_DN
        member_GN = torch.zeros(sizes.experts + 1, sizes.width)
        row_P = np.repeat(np.arange(len(experts_EF)) - sizes.shared, experts_EF.shape[1])
        row_P[row_P < 0] = sizes.experts
        member_GN.index_put_(
            (torch.from_numpy(row_P), torch.from_numpy(experts_EF.reshape(-1)).long()), torch.ones(())
        )
        self._member_GN = member_GN.to(layer.down_DN.device)
        self._group_N = self._member_GN.argmax(0) if (member_GN.sum(0) == 1).all() else None

    def coefficients(self, x_TD: torch.Tensor, router_ED: torch.Tensor) -> torch.Tensor:
        """What each neuron's output is multiplied by: the weights of the experts that it stands in, [T, N]."""
        index_TK, weights_TK = router.chosen(router_ED, x_TD, top_k=self._sizes.top_k)
        weights_TG = torch.zeros(len(x_TD), len(self._member_GN), device=x_TD.device)
        weights_TG.scatter_(1, index_TK, weights_TK * self.scale)
        weights_TG[:, -1] = 1  # the shared experts
        return weights_TG @ self._member_GN if self._group_N is None else weights_TG[:, self._group_N]

    def output(self, x_TD: torch.Tensor, h_TN: torch.Tensor) -> torch.Tensor:
        """[T, D]."""
        return (h_TN * self.coefficients(x_TD, self.router_ED)) @ self.down_DN.T

    def temper(self, *, std: float) -> None:
        """Centre the router over experts, and size it.

        Its logits get the standard deviation `std`, or less, until the spread of its weights adds no more than `ADDED`
        to the error of the choice. Where a few tokens carry most of a layer's output, as the first token of a text
        does in lower layers, their logits lie so far apart that some weights are several times 1/K, and the output
        error is several times the output. To first order the weights' part of the error grows with the square of the
        logits. Neither step changes which experts are chosen.
        """
        weight_ED = self.router_ED - self.router_ED.mean(0)
        spread = [(x_TD @ weight_ED.T).square().mean() for x_TD, _ in self._layer.chunks()]
        weight_ED *= std / torch.stack(spread).mean().sqrt().clamp_min(1e-12)
        error = moved = torch.zeros(())
        first = torch.arange(min(_TEMPER_TOKENS, len(self._layer.inputs)))
        for x_TD, h_TN in self._layer.chunks(first):
            even_TN = self.coefficients(x_TD, weight_ED * _PROBE**2)
            step_TN = self.coefficients(x_TD, weight_ED * _PROBE) - even_TN
            error = error + ((h_TN * (1 - even_TN)) @ self.down_DN.T).square().sum()
            moved = moved + ((h_TN * step_TN) @ self.down_DN.T).square().sum()
        allowed = (ADDED * error).sqrt() * _PROBE / moved.sqrt().clamp_min(1e-12)
        self.router_ED = weight_ED * min(1.0, allowed.item())

    def calibrate(self) -> None:
        """Least squares of the routed experts' scale on the dense FFN's output."""
        product = square = 0.0
        for x_TD, h_TN in self._layer.chunks():
            routed_TN = self.coefficients(x_TD, self.router_ED) - self._member_GN[-1]
            routed_TD = (h_TN * routed_TN) @ self.down_DN.T
            wanted_TD = (h_TN * (1 - self._member_GN[-1])) @ self.down_DN.T
            product += (routed_TD * wanted_TD).sum().item()
            square += routed_TD.square().sum().item()
        if product > 0:
            self.scale *= product / square

    def refit(self, *, weight_T: torch.Tensor, drift_TD: torch.Tensor) -> None:
        """Least squares of the down-projection on what the layer should add, given the router's choices.

        That is the dense FFN's output, and what the layers below have lost already (`drift_TD`). The penalty is on the
        change, so that what the calibration tokens say nothing of stays as it was.

        Args:
            weight_T: of each token's squared error; its mean is 1.
            drift_TD: the dense model's hidden states less those of the converted one, before this FFN.
        """
        width, hidden = self._sizes.width, len(self.down_DN)
        moments_NN = self.down_DN.new_zeros(width, width)
        target_ND = self.down_DN.new_zeros(width, hidden)
        parts = zip(self._layer.chunks(), weight_T.split(CHUNK), drift_TD.split(CHUNK), strict=True)
        for (x_TD, h_TN), weight, drift in parts:
            input_TN = h_TN * self.coefficients(x_TD, self.router_ED)
            weighted_TN = input_TN * weight[:, None]
            moments_NN += weighted_TN.T @ input_TN
            target_ND += weighted_TN.T @ ((h_TN - input_TN) @ self.down_DN.T + drift)
        moments_NN.diagonal().add_(RIDGE * moments_NN.diagonal().mean().clamp_min(1e-30))
        change_ND: torch.Tensor = torch.linalg.solve(moments_NN, target_ND)
        self.down_DN = self.down_DN + change_ND.T

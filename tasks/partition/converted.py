"""One converted FFN on the calibration tokens, computed from the dense one's neurons: experts are weights over them.

Here the router gets its size, the routed experts their scale, the down-projection its refit, and all three weights of
the neurons their fit.

Shapes: T tokens, D hidden, N neurons of the dense FFN, E routed experts, G = E + 1 groups, the last being the shared
experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tasks.partition import gradient_fit, router_init
from tasks.partition.layer import CHUNK, Layer, Sizes, neurons
from tasks.settings import Partition

ADDED = 0.05
"""Most that unequal weights of the chosen experts may add to a layer's squared error, as a share of it."""
RIDGE = 0.3
"""Ridge penalty on the change of the down-projection, as a share of the mean diagonal of its inputs' moments."""
OWN_TOKENS = 2560
"""The same of each expert's own change: as much as so many tokens of the expert's mean energy give."""
_PROBE = 0.01  # share of the router's size at which its effect on the weights is still linear
_TEMPER_TOKENS = 2 * CHUNK


def sum_of_weights(partition: Partition, width: int) -> float:
    """What the routed experts' weights sum to (settings.Partition.scale), before any calibration; with
    `settings.Partition.elastic` those of all experts.

    The dense FFN is the plain sum of its slices. A partition's chosen experts therefore want the weight 1 each; where
    copies are chosen whole, the slices of all chosen copies together want the weight that one copy has.
    """
    experts, top_k = partition.experts, partition.top_k
    unit: float = experts if partition.elastic else top_k
    if partition.method == "copy":
        unit = width / partition.check_width(width)
    return {
        "unit": float(unit),
        "paper": experts / top_k,
        "mean": float(experts),
        "variance": math.sqrt(top_k * experts),
        "calibrated": float(unit),
    }[partition.scale]


@dataclass(frozen=True)
class _Route:
    """Tokens that pass the same neurons: the indices of both, ascending."""

    tokens: torch.Tensor
    neurons_P: torch.Tensor
    coefficient_P: torch.Tensor | None
    """What the neurons' outputs are multiplied by; None where that differs by token."""


class Converted:
    """A dense FFN's neurons, its experts, a router and the routed experts' scale, all but the experts to be fitted."""

    def __init__(self, layer: Layer, experts_EF: np.ndarray, *, sizes: Sizes, router_ED: torch.Tensor, scale: float):
        self._layer, self._sizes = layer, sizes
        self.router_ED, self.scale = router_ED, scale
        self.gate_ND, self.up_ND, self.down_DN = layer.gate_ND, layer.up_ND, layer.down_DN
        self.change_EFD: torch.Tensor | None = None
        self._routed_EF = torch.from_numpy(experts_EF[sizes.shared :]).long().to(layer.down_DN.device)
        member_GN = torch.zeros(sizes.experts + 1, sizes.width)
        row_P = np.repeat(np.arange(len(experts_EF)) - sizes.shared, experts_EF.shape[1])
        row_P[row_P < 0] = sizes.experts
        member_GN.index_put_(
            (torch.from_numpy(row_P), torch.from_numpy(experts_EF.reshape(-1)).long()), torch.ones(())
        )
        self._member_GN = member_GN.to(layer.down_DN.device)
        self._group_N = self._member_GN.argmax(0) if (member_GN.sum(0) == 1).all() else None

    def coefficients(
        self, x_TD: torch.Tensor, router_ED: torch.Tensor, top_k_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What each neuron's output is multiplied by: the weights of the experts that it stands in, [T, N].

        Args:
            top_k_T: routed experts of each token; None: the usual number.
        """
        most = self._sizes.top_k if top_k_T is None else int(top_k_T.max())
        index_TK, weights_TK = router_init.chosen(router_ED, x_TD, top_k=most, normalised=not self._sizes.elastic)
        if top_k_T is not None:
            weights_TK = weights_TK * (torch.arange(most, device=x_TD.device) < top_k_T[:, None])
        weights_TG = torch.zeros(len(x_TD), len(self._member_GN), device=x_TD.device)
        weights_TG.scatter_(1, index_TK, weights_TK * self.scale)
        weights_TG[:, -1] = 1  # the shared experts
        return weights_TG @ self._member_GN if self._group_N is None else weights_TG[:, self._group_N]

    @property
    def _single(self) -> bool:
        """True if a token passes one routed expert, whose weight is 1."""
        return self._sizes.top_k == 1 and not self._sizes.elastic

    def is_dense(self) -> bool:
        """True if it gives the dense FFN's output already: every neuron counts once, whatever the input."""
        one_TD = torch.ones(1, self.gate_ND.shape[1], device=self.gate_ND.device)
        is_even = not self.router_ED.any()
        return is_even and bool(((self.coefficients(one_TD, self.router_ED) - 1).abs() < 1e-6).all())

    def _routes(self, x_TD: torch.Tensor) -> Iterator[_Route]:
        """Tokens that pass the same neurons. Where a token passes one routed expert or none, that leaves out zeros."""
        count = len(x_TD)
        if self._sizes.top_k > 1 or self._sizes.elastic:
            every_N = torch.arange(self._sizes.width, device=x_TD.device)
            yield _Route(torch.arange(count, device=x_TD.device), every_N, None)
            return
        scores_TE = x_TD @ self.router_ED.T if self._sizes.top_k else x_TD.new_zeros(count, 1)
        expert_T = scores_TE.argmax(1)
        for e in range(scores_TE.shape[1]):
            coefficient_N = self._member_GN[-1] + (self.scale * self._member_GN[e] if self._sizes.top_k else 0)
            neurons_P = coefficient_N.nonzero()[:, 0]
            yield _Route((expert_T == e).nonzero()[:, 0], neurons_P, coefficient_N[neurons_P])

    def _inputs(
        self, x_TD: torch.Tensor, h_TN: torch.Tensor, route: _Route, top_k_T: torch.Tensor | None
    ) -> torch.Tensor:
        """What the down-projection gets of a route's neurons, [T, P]."""
        h_TN = self._fitted(x_TD, h_TN)
        if route.coefficient_P is None:
            return h_TN * self.coefficients(x_TD, self.router_ED, top_k_T)
        return h_TN.index_select(1, route.neurons_P).mul_(route.coefficient_P)

    def _down(self, route: _Route) -> torch.Tensor:
        """The down-projection of a route's neurons, [P, D]: a copy, or the whole of it where every neuron counts."""
        return self.down_DN.T if route.coefficient_P is None else self.down_DN.T[route.neurons_P]

    def output(self, x_TD: torch.Tensor, h_TN: torch.Tensor, top_k_T: torch.Tensor | None = None) -> torch.Tensor:
        """[T, D]; `h_TN` is what the dense FFN's neurons give, good until the neurons are fitted."""
        output_TD = torch.empty_like(x_TD)
        for e, route in enumerate(self._routes(x_TD)):
            down_PD = self._down(route)
            if self.change_EFD is not None:
                down_PD[torch.searchsorted(route.neurons_P, self._routed_EF[e])] += self.change_EFD[e]
            input_TP = self._inputs(x_TD[route.tokens], h_TN[route.tokens], route, top_k_T)
            output_TD[route.tokens] = input_TP @ down_PD
        return output_TD

    def _fitted(self, x_TD: torch.Tensor, h_TN: torch.Tensor) -> torch.Tensor:
        """What the neurons give as they are now, from what the dense FFN's give."""
        return h_TN if self.gate_ND is self._layer.gate_ND else neurons(x_TD, self.gate_ND, self.up_ND)

    def temper(self, *, std: float) -> None:
        """Centre the router over experts, and size it.

        Its logits get the standard deviation `std`, or less, until the spread of its weights adds no more than `ADDED`
        to the error of the choice. Where a few tokens carry most of a layer's output, as the first token of a text
        does in lower layers, their logits lie so far apart that some weights are several times 1/K, and the output
        error is several times the output. To first order the weights' part of the error grows with the square of the
        logits. Neither step changes which experts are chosen.

        Tokens weigh as in all else that is fitted here (`Layer.weight_T`). A router that was made small for the sake
        of a few tokens with massive activations is one that a training step moves by much of its size.
        """
        weight_ED = self.router_ED - self.router_ED.mean(0)
        weight_ED *= std / (self._layer.inputs @ weight_ED.T).square().mean().sqrt().clamp_min(1e-12)
        self.router_ED = weight_ED
        if self._single:  # its weight is 1 whatever the logits
            return
        error = moved = torch.zeros(())
        first = torch.arange(min(_TEMPER_TOKENS, len(self._layer.inputs)))
        parts = zip(self._layer.chunks(first), self._layer.weights(first), self._layer.chosen(first), strict=True)
        for (x_TD, h_TN), weight_T, top_k in parts:
            even_TN = self.coefficients(x_TD, weight_ED * _PROBE**2, top_k)
            step_TN = self.coefficients(x_TD, weight_ED * _PROBE, top_k) - even_TN
            error = error + weight_T @ ((h_TN * (1 - even_TN)) @ self.down_DN.T).square().sum(1)
            moved = moved + weight_T @ ((h_TN * step_TN) @ self.down_DN.T).square().sum(1)
        allowed = (ADDED * error).sqrt() * _PROBE / moved.sqrt().clamp_min(1e-12)
        self.router_ED = weight_ED * min(1.0, allowed.item())

    def calibrate(self) -> None:
        """Least squares of the routed experts' scale on the dense FFN's output."""
        product = square = 0.0
        for (x_TD, h_TN), weight_T in zip(self._layer.chunks(), self._layer.weights(), strict=True):
            routed_TN = self.coefficients(x_TD, self.router_ED) - self._member_GN[-1]
            routed_TD = (h_TN * routed_TN) @ self.down_DN.T
            wanted_TD = (h_TN * (1 - self._member_GN[-1])) @ self.down_DN.T
            product += (weight_T @ (routed_TD * wanted_TD).sum(1)).item()
            square += (weight_T @ routed_TD.square().sum(1)).item()
        if product > 0:
            self.scale *= product / square

    def refit(self) -> None:
        """Least squares of the down-projection on what the layer should add, given the router's choices.

        That is the dense FFN's output, and what the layers below have lost already (`Layer.drift_TD`). The penalty is
        on the change, so that what the calibration tokens say nothing of stays as it was.
        """
        width = self._sizes.width
        moments_NN, target_ND = self.down_DN.new_zeros(width, width), torch.zeros_like(self.down_DN.T)
        for route in self._routes(self._layer.inputs):
            whole = route.coefficient_P is None
            moments_PP, target_PD = self._sums(route, moments_NN if whole else None)
            if not whole:
                moments_NN[route.neurons_P[:, None], route.neurons_P] += moments_PP
            target_ND[route.neurons_P] += target_PD
        moments_NN.diagonal().add_(RIDGE * moments_NN.diagonal().mean().clamp_min(1e-30))
        change_ND = _solve(moments_NN, target_ND)
        self.down_DN = self.down_DN + change_ND.T

    def refit_experts(self) -> None:
        """Least squares of the down-projection together with each expert's own change of it.

        For experts that overlap, of which a token passes one: a neuron then need not do the same in all of them. Both
        changes have a penalty; the more tokens an expert has, the less its own weighs. Each expert's own change is
        eliminated from the sums of its tokens, which leaves a system of all neurons as `refit` has it (the Schur
        complement).
        """
        width = self._sizes.width
        moments_NN, target_ND = self.down_DN.new_zeros(width, width), torch.zeros_like(self.down_DN.T)
        energy, eliminated = 0.0, []
        for e, route in enumerate(self._routes(self._layer.inputs)):
            neurons_P = route.neurons_P
            moments_PP, target_PD = self._sums(route)
            place_F = torch.searchsorted(neurons_P, self._routed_EF[e])
            own_FF = moments_PP[place_F[:, None], place_F]
            share = OWN_TOKENS / max(len(route.tokens), 1)
            own_FF.diagonal().add_(share * own_FF.diagonal().mean().clamp_min(1e-30))
            beside_FP, target_FD = moments_PP[place_F], target_PD[place_F]
            # own change = target_FD - beside_FP @ change of the route's neurons, both solved by own_FF
            solved = torch.linalg.solve(own_FF, torch.cat([beside_FP, target_FD], dim=1))
            beside_solved_FP, target_solved_FD = solved[:, : len(neurons_P)], solved[:, len(neurons_P) :]
            energy += moments_PP.trace().item()
            moments_NN[neurons_P[:, None], neurons_P] += moments_PP - beside_FP.T @ beside_solved_FP
            target_ND[neurons_P] += target_PD - beside_FP.T @ target_solved_FD
            eliminated.append((neurons_P, beside_solved_FP, target_solved_FD))
        moments_NN.diagonal().add_(max(RIDGE * energy / width, 1e-30))
        change_ND = _solve(moments_NN, target_ND)
        self.change_EFD = torch.stack([target - beside @ change_ND[neurons] for neurons, beside, target in eliminated])
        self.down_DN = self.down_DN + change_ND.T

    def _sums(self, route: _Route, moments_PP: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted moments [P, P] of what the down-projection gets on a route, and with the error that is left [P, D].

        The moments are added to `moments_PP`, if that is given.
        """
        count, tokens, drift_TD = len(route.neurons_P), route.tokens, self._drift()
        if moments_PP is None:
            moments_PP = self.down_DN.new_zeros(count, count)
        target_PD, down_PD = self.down_DN.new_zeros(count, len(self.down_DN)), self._down(route)
        layer = self._layer
        chosen, places = layer.chosen(tokens), tokens.split(CHUNK)
        for (x_TD, h_TN), weight_T, top_k, part in zip(
            layer.chunks(tokens), layer.weights(tokens), chosen, places, strict=True
        ):
            input_TP = self._inputs(x_TD, h_TN, route, top_k)
            weighted_TP = input_TP * weight_T[:, None]
            error_TD = layer.output_TD[part] + drift_TD[part]
            moments_PP.addmm_(weighted_TP.T, input_TP)
            target_PD.addmm_(weighted_TP.T, error_TD.addmm_(input_TP, down_PD, alpha=-1))
        return moments_PP, target_PD

    def fit(self, passes: int, *, seed: int) -> None:
        """Train all weights of the neurons on what `refit` is fitted to (`gradient_fit`); the router stays."""

        def target(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            top_k_T = None if self._layer.top_k_T is None else self._layer.top_k_T[part]
            coefficient_TN = self.coefficients(self._layer.inputs[part], self.router_ED, top_k_T)
            return coefficient_TN, self._layer.output_TD[part] + drift_TD[part]

        drift_TD = self._drift()
        weights = (self.gate_ND, self.up_ND, self.down_DN)
        self.gate_ND, self.up_ND, self.down_DN = gradient_fit.fit(
            weights, layer=self._layer, target=target, passes=passes, seed=seed
        )

    def _drift(self) -> torch.Tensor:
        drift_TD = self._layer.drift_TD
        return torch.zeros_like(self._layer.inputs) if drift_TD is None else drift_TD


def _solve(moments_NN: torch.Tensor, target_ND: torch.Tensor) -> torch.Tensor:
    """moments^-1 target, [N, D]; 0 for what has no target, as neurons that no token passes."""
    used_M = target_ND.any(1).nonzero()[:, 0]
    change_ND: torch.Tensor
    if len(used_M) == len(target_ND):
        change_ND = torch.linalg.solve(moments_NN, target_ND)
        return change_ND
    change_ND = torch.zeros_like(target_ND)
    change_ND[used_M] = torch.linalg.solve(moments_NN[used_M[:, None], used_M], target_ND[used_M])
    return change_ND

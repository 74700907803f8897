"""One converted FFN on the calibration tokens, computed from the dense one's neurons: experts are weights over them.

Here the router gets its size, the routed experts their scale, the down-projection its refit, and all three weights of
the neurons their fit.

Shapes: T tokens, D hidden, N neurons of the dense FFN, E routed experts, G = E + 1 groups, the last being the shared
experts, K experts per token.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tasks.partition import router_init
from tasks.partition.layer import CHUNK, Layer, Sizes, neurons
from tasks.settings import Partition

ADDED = 0.05
"""Most that unequal weights of the chosen experts may add to a layer's squared error, as a share of it."""
RIDGE = 0.3
"""Ridge penalty on the change of the down-projection, as a share of the mean diagonal of its inputs' moments."""
OWN_RIDGE = 3.0
"""The same of each expert's own change: its tokens are fewer."""
FIT_RATE = 0.01
"""Peak of the fit's learning rates, as a share of each matrix's root mean square."""
FIT_BATCH = 512  # tokens
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

    def coefficients(self, x_TD: torch.Tensor, router_ED: torch.Tensor) -> torch.Tensor:
        """What each neuron's output is multiplied by: the weights of the experts that it stands in, [T, N]."""
        index_TK, weights_TK = router_init.chosen(router_ED, x_TD, top_k=self._sizes.top_k)
        weights_TG = torch.zeros(len(x_TD), len(self._member_GN), device=x_TD.device)
        weights_TG.scatter_(1, index_TK, weights_TK * self.scale)
        weights_TG[:, -1] = 1  # the shared experts
        return weights_TG @ self._member_GN if self._group_N is None else weights_TG[:, self._group_N]

    def is_dense(self) -> bool:
        """True if it gives the dense FFN's output already: every neuron counts once, whatever the input."""
        one_TD = torch.ones(1, self.gate_ND.shape[1], device=self.gate_ND.device)
        is_even = not self.router_ED.any()
        return is_even and bool(((self.coefficients(one_TD, self.router_ED) - 1).abs() < 1e-6).all())

    def output(self, x_TD: torch.Tensor, h_TN: torch.Tensor) -> torch.Tensor:
        """[T, D]; `h_TN` is what the dense FFN's neurons give, good until the neurons are fitted."""
        h_TN = self._fitted(x_TD, h_TN)
        output_TD = (h_TN * self.coefficients(x_TD, self.router_ED)) @ self.down_DN.T
        if self.change_EFD is not None:
            expert_T = (x_TD @ self.router_ED.T).argmax(1)
            for e, change_FD in enumerate(self.change_EFD):
                mine = (expert_T == e).nonzero()[:, 0]
                output_TD[mine] += self.scale * (h_TN[mine][:, self._routed_EF[e]] @ change_FD)
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
        spread = [(x_TD @ weight_ED.T).square().mean() for x_TD, _ in self._layer.chunks()]
        weight_ED *= std / torch.stack(spread).mean().sqrt().clamp_min(1e-12)
        error = moved = torch.zeros(())
        first = torch.arange(min(_TEMPER_TOKENS, len(self._layer.inputs)))
        for (x_TD, h_TN), weight_T in zip(self._layer.chunks(first), self._layer.weights(first), strict=True):
            even_TN = self.coefficients(x_TD, weight_ED * _PROBE**2)
            step_TN = self.coefficients(x_TD, weight_ED * _PROBE) - even_TN
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
        width, hidden = self._sizes.width, len(self.down_DN)
        moments_NN = self.down_DN.new_zeros(width, width)
        target_ND = self.down_DN.new_zeros(width, hidden)
        parts = zip(self._layer.chunks(), self._layer.weights(), self._drift().split(CHUNK), strict=True)
        for (x_TD, h_TN), weight, drift in parts:
            input_TN = h_TN * self.coefficients(x_TD, self.router_ED)
            weighted_TN = input_TN * weight[:, None]
            moments_NN += weighted_TN.T @ input_TN
            target_ND += weighted_TN.T @ ((h_TN - input_TN) @ self.down_DN.T + drift)
        moments_NN.diagonal().add_(RIDGE * moments_NN.diagonal().mean().clamp_min(1e-30))
        change_ND: torch.Tensor = torch.linalg.solve(moments_NN, target_ND)
        self.down_DN = self.down_DN + change_ND.T

    def refit_experts(self) -> None:
        """Least squares of each expert's own down-projection on what `refit` leaves of its tokens' error.

        For experts that overlap, of which a token passes one: a neuron then need not do the same in all of them. The
        penalty is on the change from the common down-projection.
        """
        expert_T = (self._layer.inputs @ self.router_ED.T).argmax(1)
        weight_T = torch.cat(list(self._layer.weights()))
        drift_TD, (experts, size) = self._drift(), self._routed_EF.shape
        changes = []
        for e in range(experts):
            moments_FF = self.down_DN.new_zeros(size, size)
            target_FD = self.down_DN.new_zeros(size, len(self.down_DN))
            mine = (expert_T == e).nonzero()[:, 0]
            parts = zip(self._layer.chunks(mine), mine.split(CHUNK), strict=True)
            for (x_TD, h_TN), part in parts:
                input_TF = self._fitted(x_TD, h_TN)[:, self._routed_EF[e]]
                weighted_TF = input_TF * weight_T[part, None]
                error_TD = h_TN @ self._layer.down_DN.T + drift_TD[part] - self.output(x_TD, h_TN)
                moments_FF += weighted_TF.T @ input_TF
                target_FD += weighted_TF.T @ error_TD
            moments_FF.diagonal().add_(OWN_RIDGE * moments_FF.diagonal().mean().clamp_min(1e-30))
            changes.append(torch.linalg.solve(moments_FF, target_FD) / self.scale)
        self.change_EFD = torch.stack(changes)

    @torch.enable_grad()
    def fit(self, passes: int, *, seed: int) -> None:
        """Train gate, up and down of all neurons on what `refit` is fitted to, so many times over the tokens.

        Adam, batches of FIT_BATCH tokens, cosine to 0. The rate of a matrix follows its size. The router's choices are
        given: no gradient reaches the router.

        Args:
            seed: of the order of the tokens.
        """
        drift_TD = self._drift()
        weights = [weight.detach().clone().requires_grad_() for weight in (self.gate_ND, self.up_ND, self.down_DN)]
        peaks = [FIT_RATE * weight.detach().square().mean().sqrt().item() for weight in weights]
        optimizer = torch.optim.Adam(
            [{"params": [weight], "lr": 0.0} for weight in weights], betas=(0.9, 0.95), fused=True
        )
        generator = torch.Generator().manual_seed(seed * 100_003 + self._layer.number)
        count = len(drift_TD)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
        steps = order.to(drift_TD.device).split(FIT_BATCH)
        with torch.no_grad():
            output_TD = torch.cat([h_TN @ self._layer.down_DN.T for _, h_TN in self._layer.chunks()])
            weight_T = torch.cat(list(self._layer.weights()))
        for step, part in enumerate(steps):
            x_TD, weight = self._layer.inputs[part], weight_T[part]
            with torch.no_grad():
                target_TD = output_TD[part] + drift_TD[part]
                coefficient_TN = self.coefficients(x_TD, self.router_ED)
            gate_ND, up_ND, down_DN = weights
            error_TD = (neurons(x_TD, gate_ND, up_ND) * coefficient_TN) @ down_DN.T - target_TD
            optimizer.zero_grad()
            (error_TD.square().sum(1) * weight).mean().backward()
            share = min(1.0, 10 * (step + 1) / len(steps)) * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            optimizer.step()
        self.gate_ND, self.up_ND, self.down_DN = (weight.detach() for weight in weights)

    def _drift(self) -> torch.Tensor:
        drift_TD = self._layer.drift_TD
        return torch.zeros_like(self._layer.inputs) if drift_TD is None else drift_TD

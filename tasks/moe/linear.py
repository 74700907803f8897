"""The linear router that comes nearest to a two-layer gate or to a biased choice, for what a stock class loads.

- For a two-layer gate the router is a mix of the gate's own first layer, A inner, with A by least squares on the
  gate's logits centred over experts: top-k and softmax see differences alone. Were the inputs elliptical, the
  least-squares router of all would be such a mix; on hidden states of text, E x E free numbers keep more choices than
  E x D do (docs/plugins/llama_moe.md).
- For a selection bias b it is plus b v, where v x is as near to 1 as a linear function of the hidden states comes. The
  bias then acts on the weights too, by e^b before they are normalised; `weight_error` has it.

Shapes: T tokens, D hidden, E routed experts, B windows, L their length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import architectures, layout
from tasks.moe import device
from tasks.moe import gate as gates
from tasks.moe.gate import Gate
from tasks.moe.streamed import Streamed

RIDGE = 1e-6
"""Ridge penalty, as a share of the mean diagonal of the inner logits' second moments."""
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Those tried for the bias, as shares of the mean diagonal of the hidden states' second moments."""
SAMPLES = 4096


def fit(
    gate: Gate, x_TD: torch.Tensor, *, top_k: int, dtype: torch.dtype, normalised: bool = True
) -> tuple[torch.Tensor, dict[str, float]]:
    """The router that fits the gate best on three quarters of these inputs, and how well it does on the last one.

    Args:
        x_TD: what the FFN reads, float32, on the device to compute on.
        top_k: experts per token.
        dtype: in which the router will be stored; it is judged as stored.
        normalised: whether the weights of the chosen experts sum to 1; else they are their shares of all experts.

    Returns:
        The router [E, D], and as `agreement` the share of the gate's choices that it makes as well, as `weight_error`
        the mean difference of the weights of the gate's choices, as `r2` the share of the variance of the centred
        logits, with the bias, that choose.
    """
    used_TD = x_TD[: -(-len(x_TD) * 3 // 4)]
    router_ED = gate.inner_ED.to(x_TD.device, torch.float64)
    if gate.outer_EE is not None:
        inner_TE = (used_TD @ gate.inner_ED.to(x_TD).T).double()
        moments_EE = inner_TE.T @ inner_TE
        moments_EE.diagonal().add_(RIDGE * moments_EE.diagonal().mean())
        router_ED = torch.linalg.solve(moments_EE, inner_TE.T @ _centred(gate.logits(used_TD)).double()).T @ router_ED
    if gate.bias_E is not None:
        router_ED = router_ED + torch.outer(gate.bias_E.to(router_ED), _one(used_TD.double()))
    router_ED = router_ED.to(dtype)
    others_TD = x_TD[-max(1, len(x_TD) // 4) :]
    return router_ED, report(gate, router_ED, others_TD, top_k=top_k, normalised=normalised)


def _one(x_TD: torch.Tensor) -> torch.Tensor:
    """The v for which v x comes nearest to 1 by ridge regression, float64 [D].

    Of RIDGES that is taken which does best on the last quarter when fitted on the rest: there can be as many hidden
    units as tokens.
    """
    cut = len(x_TD) * 3 // 4
    values_D, vectors_DD = torch.linalg.eigh(x_TD[:cut].T @ x_TD[:cut] / cut)
    mean_D, scale = vectors_DD.T @ x_TD[:cut].mean(0), values_D.mean()
    candidates: list[torch.Tensor] = [
        vectors_DD @ (mean_D / (values_D.clamp(min=0) + ridge * scale)) for ridge in RIDGES
    ]
    return min(candidates, key=lambda v_D: (x_TD[cut:] @ v_D - 1).square().mean().item())


def fit_gaussian(
    gate: Gate, norm_D: torch.Tensor, *, top_k: int, dtype: torch.dtype, normalised: bool = True, seed: int = 0
) -> tuple[torch.Tensor, dict[str, float]]:
    """The same without text, for x = norm * N(0, I), which is what a random direction gives behind RMSNorm.

    Least squares over all such x, and all routers, has a closed form by Stein's lemma:
    E[x tanh(w x)] = E[x x'] w E[tanh'(w x)]. No linear function of such x has anything of a constant, so a bias is
    left out.
    """
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(SAMPLES, len(norm_D), generator=generator) * norm_D.float()
    router_ED = gate.inner_ED.float()
    if gate.outer_EE is not None:
        slope_E = (1 - torch.tanh(x_TD @ router_ED.T) ** 2).mean(0)
        outer_EE = gate.outer_EE.float()
        router_ED = (outer_EE - outer_EE.mean(0)) * slope_E @ router_ED
    router_ED = router_ED.to(dtype)
    return router_ED, report(gate, router_ED, x_TD, top_k=top_k, normalised=normalised)


def report(
    gate: Gate, router_ED: torch.Tensor, x_TD: torch.Tensor, *, top_k: int, normalised: bool = True
) -> dict[str, float]:
    """How near a router comes to the gate on these inputs; see `fit`."""
    clean_TE, found_TE = gate.logits(x_TD), x_TD @ router_ED.to(x_TD).T
    wanted_TE = clean_TE if gate.bias_E is None else clean_TE + gate.bias_E.to(clean_TE)
    weights, chosen = [], []
    for by_TE, logits_TE in ((wanted_TE, clean_TE), (found_TE, found_TE)):
        index = by_TE.topk(top_k, dim=1).indices
        values = logits_TE.gather(1, index).softmax(1) if normalised else logits_TE.softmax(1).gather(1, index)
        weights.append(torch.zeros_like(logits_TE).scatter(1, index, values))
        chosen.append(torch.zeros_like(logits_TE).scatter(1, index, 1.0))
    centred_TE = _centred(wanted_TE)
    lost = (_centred(found_TE) - centred_TE).square().sum() / centred_TE.square().sum().clamp_min(1e-30)
    return {
        "agreement": (chosen[0] * chosen[1]).sum().item() / chosen[0].sum().item(),
        "weight_error": (weights[1] - weights[0])[chosen[0] > 0].abs().mean().item(),
        "r2": 1 - lost.item(),
    }


def refit(
    folder: Path, made: Mapping[int, Gate], ids_BL: np.ndarray | None = None, *, batch: int = 4
) -> dict[str, Any]:
    """Fit the routers of a stock checkpoint to its gates or biased routers, and write them over those in its files.

    The text passes the model layer by layer with the exact gates; one layer and the text's hidden states are in
    memory.

    Args:
        folder: the checkpoint; not yet read by anybody else.
        made: the gates, by layer.
        ids_BL: token windows to fit on; without them see `fit_gaussian`.
        batch: windows that run at once.

    Returns:
        inputs (`text` or `gaussian`), tokens; per layer and as mean what `fit` reports.
    """
    model = Streamed(folder, device=device.default())
    how: dict[str, Any] = {
        "top_k": model.config.num_experts_per_tok,
        "normalised": getattr(model.config, "norm_topk_prob", True),
    }
    router = architectures.SPARSE[model.config.model_type].stored_router
    hidden_BLD = None if ids_BL is None else model.embed(torch.from_numpy(ids_BL))
    layers: dict[str, dict[str, float]] = {}
    for i in range(model.layers):
        x_TD = None if hidden_BLD is None else _pass(model, i, hidden_BLD, gate=made.get(i), batch=batch)
        if i not in made:
            continue
        stored = model.stored[f"{layout.block(i)}.{router}"]
        if x_TD is None:
            norm_D = model.tensor(layout.ffn_norm(i))
            router_ED, layers[str(i)] = fit_gaussian(made[i], norm_D, dtype=stored.dtype, **how)
        else:
            router_ED, layers[str(i)] = fit(made[i], x_TD, dtype=stored.dtype, **how)
        _overwrite(stored.file, stored.offset, router_ED)
    mean = {key: float(np.mean([each[key] for each in layers.values()])) for key in next(iter(layers.values()))}
    inputs = {"inputs": "gaussian", "tokens": SAMPLES} if ids_BL is None else {"inputs": "text", "tokens": ids_BL.size}
    return {**inputs, "mean": mean, "layers": layers}


@torch.no_grad()
def _pass(model: Streamed, i: int, hidden_BLD: torch.Tensor, *, gate: Gate | None, batch: int) -> torch.Tensor | None:
    """Move the hidden states through layer `i`, with its gate; what its FFN read, [T, D], where there is a gate."""
    block, seen = model.block(i), []
    if gate is not None:
        router = gates.router(block)
        gates.swap(router, gate)
        router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    where = model.attention(i, hidden_BLD.shape[1])
    for part in hidden_BLD.split(batch):
        part.copy_(block(part, **where))
    return torch.cat(seen) if seen else None


def _centred(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE - logits_TE.mean(1, keepdim=True)


def _overwrite(file: Path, offset: int, tensor: torch.Tensor) -> None:
    content = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    with file.open("r+b") as target:
        target.seek(offset)
        target.write(content)

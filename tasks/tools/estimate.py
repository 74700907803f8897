"""What a training run will need, from its settings: memory per process and ZeRO stage, disk, and with a speed, time.

The terms are those of what the engine does, stage by stage; tests hold them against real runs.

Shapes: T tokens of a forward pass, D hidden, V vocabulary, K experts per token, E experts, F width of one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from tasks import architectures
from tasks.moe import counts
from tasks.pretrain import schedule
from tasks.pretrain.engine.configuration import BUCKET
from tasks.settings import Pretrain

PROCESS = 0.65e9
"""Bytes of a training process without a model: Python, torch for CPU, DeepSpeed, transformers, a corpus, a tracker."""
_LIVE = 1_000_000_000
"""Elements of weights that ZeRO 3 leaves gathered (max_live_parameters, max_reuse_distance)."""
_PRIMITIVES, _PRIMITIVE = 1024, 0.66e6
"""oneDNN's bfloat16 products that it keeps compiled, one for each number of rows, and bytes of each, as measured."""
_HEAP = 0.02
"""Share of a CPU process's tensors that glibc cannot use again between them, as measured."""
_MASTER, _MOMENTS, _SUMS = 4, 8, 4  # bytes a parameter: float32 weights, AdamW's two moments, summed gradients


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at its peak, by what takes them."""

    host: dict[str, float]
    device: dict[str, float]
    """Empty without a GPU: everything is the host's then."""

    @property
    def host_total(self) -> float:
        return sum(self.host.values())

    @property
    def device_total(self) -> float:
        return sum(self.device.values())


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What `calibrate` measured, in seconds of wall clock."""

    start: float
    """Until the engine is built."""
    micro_batch: float
    """Forward and backward of one micro-batch on every process."""
    optimizer: float
    """The optimizer step."""
    evaluation: float
    """A forward pass of one validation window."""
    copy: float
    """Copying a byte of a checkpoint, which is written in the background then."""
    processes: int
    """How many ran."""
    peak: int
    """Bytes of the process that took the most, on its GPU or, without one, in RAM."""

    def step(self, params: Pretrain) -> float:
        """Seconds of an optimizer step; processes that could not be run here are taken to cost no time."""
        return params.batch // (params.micro_batch * params.processes) * self.micro_batch + self.optimizer

    def run(self, params: Pretrain, *, domains: int, checkpoint: float) -> dict[str, float]:
        """Seconds of a whole run: start, steps, evaluation, checkpoints of so many bytes."""
        return {
            "start": self.start,
            "steps": params.steps * self.step(params),
            "evaluation": evaluated_windows(params, domains=domains) * self.evaluation / params.processes,
            "checkpoints": -(-params.steps // params.save_every) * self.copy * checkpoint / params.processes,
        }


def evaluated_windows(params: Pretrain, *, domains: int) -> int:
    """Validation windows of a run: before the first step, every eval_every steps, and after the last."""
    times = 1 + params.steps // params.eval_every + (params.steps % params.eval_every > 0)
    return times * params.eval_windows * domains


def trained(config: Any, params: Pretrain) -> int:
    """Parameters that some phase of `train` moves."""
    sizes = counts.parameters(config)
    what = {what for _, what in params.phases}
    if "all" in what:
        return sizes["total"]
    return sizes["router"] + (sizes["experts"] + sizes["shared"] if "experts" in what else 0)


def memory(
    config: dict[str, Any],
    params: Pretrain,
    *,
    bfloat16: bool,
    cuda: bool = False,
    parent: dict[str, Any] | None = None,
    first: bool = True,
) -> Memory:
    """Memory of one process.

    AdamW keeps two float32 moments beside a float32 master of each trained weight; only ZeRO 0 in float32 needs no
    master of its own. ZeRO 1, 2 and 3 divide masters and moments, then gradients, then weights over the processes;
    the experts' over those that hold the same experts. What a checkpoint holds of a process is copied before it is
    written (tasks/pretrain/engine/checkpoint_writer.py).

    Args:
        config: the converted model's config.json; parent: the dense parent's, if `distill` keeps it in memory.
        bfloat16: the training dtype; float32 if not.
        cuda: train on GPUs.
        first: rank 0, which also saves whole weights, and gathers them in float32 at the end.
    """
    sizes, width, stage, shards = counts.parameters(config), 2 if bfloat16 else 4, params.zero_stage, params.processes
    elsewhere = sizes["experts"] * (1 - 1 / params.expert_parallel)
    moved = trained(config, params)
    held, moved_here = sizes["total"] - elsewhere, moved - (elsewhere if moved > sizes["router"] else 0)
    sums = _SUMS if bfloat16 and stage > 0 and params.batch > params.micro_batch * shards else 0

    def divided(from_stage: int, *, whole: float = moved, here: float = moved_here) -> float:
        return whole / shards if stage >= from_stage else here

    weights = divided(3, whole=sizes["total"], here=held) * width
    optimizer = divided(1) * _states(params, bfloat16=bfloat16)
    buffers = 0.0
    if cuda and stage >= 1:
        buffers += min(BUCKET, sizes["total"]) * (2 if stage < 3 else 1) * (sums if sums and stage == 1 else width)
    elif shards > 1:  # gradients before they are divided, or gloo's while it adds them up
        buffers += min(BUCKET, moved_here) * width
    if stage == 3 and shards > 1:
        buffers += min(_LIVE, held) * width
    own = {"weights": weights, "gradients": divided(2) * (width + sums), "optimizer": optimizer, "buffers": buffers}
    own |= activations(config, params, bfloat16=bfloat16, cuda=cuda)
    if parent is not None and params.distill and params.distill.top_n is None:
        own["parent"] = counts.parameters(parent)["total"] * width
    saved = optimizer + (weights if stage == 3 else held * width * first)
    gathered = sizes["total"] * (_MASTER + width) * first  # in float32, then in the model's dtype
    if cuda:
        host = {"process": PROCESS, "checkpoint": max(saved, gathered)}
        for part in ("optimizer", "weights")[: params.offload * (2 if stage == 3 else 1)]:
            host[part], own[part] = own[part], 0.0
        return Memory(host=host, device=own)
    # What DeepSpeed frees of the unflattened weights stays with the process: no later buffer fits in between.
    own["buffers"] += weights * (stage > 0)
    if stage > 0:  # the optimizer step's own gradients, flat and in float32, when the activations are gone
        own["buffers"] += max(0.0, divided(1) * (width + _MASTER) - own["activations"] - own["logits"])
    own["buffers"] += _HEAP * sum(own.values())
    own["buffers"] += _compiled(config, params, bfloat16=bfloat16)
    freed = own["activations"] + own["logits"] + own["gradients"]  # when the last step is done
    return Memory(host={"process": PROCESS, **own, "checkpoint": max(saved, gathered - freed)}, device={})


def _compiled(config: dict[str, Any], params: Pretrain, *, bfloat16: bool) -> float:
    """Bytes of oneDNN's compiled products on a CPU: experts get other numbers of tokens in each pass."""
    from moe_kernels import sorted_rows

    sizes = counts.experts(config)
    tokens = params.micro_batch * params.seq_len
    if not bfloat16 or _all_experts(sizes, tokens=tokens, bfloat16=True):
        return 0.0
    passes = params.steps * params.batch // (params.micro_batch * params.processes)
    numbers = len({sorted_rows.rounded(rows) for rows in range(1, tokens + 1)})
    drawn: int = len(sizes["layers"]) * sizes["experts"] * passes
    # gate with up, and down: forward, and two products backward
    return min(_PRIMITIVES, 6 * min(numbers, drawn)) * _PRIMITIVE


def _states(params: Pretrain, *, bfloat16: bool) -> int:
    """Bytes of the optimizer a trained parameter."""
    return _MOMENTS + (0 if params.zero_stage == 0 and not bfloat16 else _MASTER)


def activations(config: dict[str, Any], params: Pretrain, *, bfloat16: bool, cuda: bool) -> dict[str, float]:
    """Bytes that autograd keeps of one micro-batch: {activations, logits}.

    A layer keeps, of each token: the states before both norms in float32, their normalised states and what they give;
    queries, keys, values and output of an attention without scores; gate and up of the experts that were computed; and
    four tensors of a stock FFN (gate, its SiLU, up, product). With gradient checkpointing it keeps its input alone,
    and one layer at a time all of it. Liger's loss on CUDA makes no logits of a whole pass (docs/pretrain.md).
    """
    import torch
    from moe_kernels import sorted_rows
    from transformers import AutoConfig

    model: Any = AutoConfig.for_model(**config)
    sizes = counts.experts(model)
    width, tokens = 2 if bfloat16 else 4, params.micro_batch * params.seq_len
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_dim, row = architectures.head_dim(model), architectures.row(model)
    queries, keys = heads * head_dim, model.num_key_value_heads * head_dim
    common = 2 * 4 * hidden + width * (4 * hidden + 2 * queries + 2 * keys) + 4 * heads
    if row.qk_norm:  # norms of queries and keys
        common += (4 + width) * (queries + keys)
    dense_path = not cuda and _all_experts(sizes, tokens=tokens, bfloat16=bfloat16)
    rows = float(sizes["experts"])
    if not dense_path:
        dtype, device = (torch.bfloat16 if bfloat16 else torch.float32), ("cuda" if cuda else "cpu")
        routed = tokens * sizes["top_k"]
        rows = sorted_rows.hidden_rows(routed, experts=sizes["experts"], dtype=dtype, device=device) / tokens
    sparse = common + width * (2 * rows * sizes["expert_size"] + 4 * sizes["shared_size"])
    sparse += 4 * sizes["experts"] + 16 * sizes["top_k"]  # the router's
    if row.shared_gate:  # the gate of the shared expert, and what it is multiplied with
        sparse += width * (hidden + 2) + 8 * sizes["top_k"]
    dense = common + width * 4 * model.intermediate_size
    layers, moe = model.num_hidden_layers, len(sizes["layers"])
    kept = moe * sparse + (layers - moe) * dense
    if params.gradient_checkpointing:
        kept = layers * hidden * width + (sparse if moe == layers else max(sparse, dense))
    kept += (4 + 2 * width) * hidden  # the last norm and the head's input
    if params.distill and params.distill.hidden:
        kept += 2 * layers * hidden * width  # own and the parent's
    distils = params.distill is not None and params.distill.logits > 0
    if distils:
        logits = 2 * width  # and their gradient; softmaxes are made a few tokens at a time
    elif cuda:
        logits = 0 if importlib.util.find_spec("liger_kernel") else width + 3 * 4
    else:
        logits = 4 * 4  # in float32, log-probabilities, and two gradients: glibc fits none where another was
    return {"activations": float(tokens * kept), "logits": float(tokens * model.vocab_size * logits)}


def _all_experts(sizes: dict[str, Any], *, tokens: int, bfloat16: bool) -> bool:
    """Whether moe_kernels computes all experts for every token on a CPU (its dense path), and not the chosen alone."""
    import torch
    from moe_kernels import cpu

    if not sizes["layers"]:
        return True
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    path = cpu.choose_regime(sizes["experts"], sizes["top_k"], width=sizes["expert_size"], tokens=tokens, dtype=dtype)
    return path == "dense"


def checkpoint_bytes(config: dict[str, Any], params: Pretrain, *, bfloat16: bool) -> float:
    """A training checkpoint of all processes: weights, masters and moments."""
    weights = counts.parameters(config)["total"] * (2 if bfloat16 else 4)
    return weights + trained(config, params) * _states(params, bfloat16=bfloat16)


def disk(config: dict[str, Any], params: Pretrain, *, bfloat16: bool) -> dict[str, float]:
    """Bytes in .scratch at their peak: the checkpoints kept and the one being written; the parent's cached logits.

    What `keep_finished` keeps of the run is a part of the first.
    """
    stable = schedule.stable(params) is not None
    kept = min(params.keep, -(-params.steps // params.save_every))
    if params.keep_every:
        kept += params.steps // params.keep_every
    kept += stable
    left = ("; 2 stay, to run longer" if stable else "; 1 stays, to publish again") * params.keep_finished
    name = f"training checkpoints in .scratch, {kept} and one being written{left}"
    sizes = {name: (kept + 1) * checkpoint_bytes(config, params, bfloat16=bfloat16)}
    if params.distill and params.distill.top_n:
        ids = 2 if config["vocab_size"] <= 1 << 16 else 4
        cached = params.steps * params.step_tokens * (params.distill.top_n * (ids + 2) + 4)
        sizes["the parent's logits in .scratch"] = float(cached)
    return sizes

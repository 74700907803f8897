"""The section `pretrain` of a pipeline: continual pre-training (tasks/pretrain)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tasks import plugin
from tasks.settings.fields import LARGEST, Above, Frozen, NotNegative, Positive, Seed, SeqLen, Share, extended

What = Literal["all", "router", "experts"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
FIXED: dict[str, None] = dict.fromkeys(plugin.choices("pretrain.moves_weights"))
"""The settings of plug-ins that move the domain weights, with the value by which the weights stay as they are."""
Part = Literal["router", "experts", "shared", "ffn", "attention", "norms", "embeddings", "masks"]


class Balance(Frozen):
    """How tokens are kept spread over the experts."""

    loss: Literal["switch", "mixtral", "global_batch", "cv2", "bias", "none"] = "switch"
    """switch: Switch's loss for each layer and micro-batch; mixtral: transformers', over all layers joined;
    global_batch: Switch's with the shares of the whole batch; cv2: LLaMA-MoE's, of importance and load; bias: no
    loss, a bias on the choice (arXiv 2408.15664), folded into the linear router at export; none."""
    coefficient: NotNegative = 0.01
    """What the loss is multiplied by; for `bias`, how far a step moves it."""
    z_loss: NotNegative = 0.0
    """Coefficient of the router z-loss."""


class Distill(Frozen):
    """Distillation from the dense parent, beside the cross-entropy."""

    cross_entropy: NotNegative = 1.0
    """Coefficient of the cross-entropy."""
    logits: NotNegative = 1.0
    """Coefficient of KL(parent | student) of the next token."""
    temperature: Above = 1.0
    hidden: NotNegative = 0.0
    """Coefficient of the squared error of the hidden states, relative to the parent's."""
    layers: Literal["last", "all"] = "last"
    """Whose hidden states."""
    top_n: Positive | None = None
    """Keep the parent's n largest logits of every token in shards, so that it isn't in memory during training."""

    @model_validator(mode="after")
    def _cache(self) -> Self:
        if not self.logits and not self.hidden:
            raise ValueError("logits and hidden are both 0; leave `distill` out")
        if self.top_n is not None and self.hidden:
            raise ValueError("top_n keeps logits alone; set hidden: 0, or leave top_n out")
        return self


class Phase(Frozen):
    what: What
    tokens: Positive | None = None
    """Rounded up to whole steps; the last phase has none, and lasts to the end."""


class Guard(Frozen):
    """What follows a loss or a gradient that isn't finite, or a spike."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """skip: leave the batch out; rollback: go back to the last checkpoint and leave out the batches since."""
    spike: Annotated[float, Field(gt=1, le=1e30)] | None = None
    """A step's loss counts as a spike above this multiple of the running mean; absent: no limit."""
    limit: Positive = 3
    """Stop after so many interventions without a sound step as long as the last one lost."""


@extended("pretrain")
class Pretrain(Frozen):
    """Continual pre-training (tasks/pretrain)."""

    tokens: Positive
    """Training tokens; rounded up to whole steps of batch x seq_len."""
    seq_len: SeqLen
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill the windows: end to end and cut anywhere, or whole where they fit, with padding behind."""
    mask_documents: bool = False
    """Attention, positions and loss stop at document boundaries."""
    batch: Positive
    """Sequences per optimizer step, over all processes."""
    micro_batch: Positive = 1
    """Sequences per forward pass and process; batch must be a multiple of micro_batch x processes."""

    processes: Positive = 1
    launcher: Literal["local", "hostfile", "slurm"] = "local"
    """Where the processes run: here, on the machines of `hostfile`, or as tasks of the Slurm job around the stage."""
    hostfile: str | None = None
    """DeepSpeed's: a line `host slots=N` a machine."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: bool = False
    """Keep the optimizer, and with zero_stage 3 the weights too, in the CPU's memory."""
    expert_parallel: Positive = 1
    """Processes over which the experts of a layer are spread (DeepSpeed's AutoEP); 1: every process has all."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 where the processor has it."""
    gradient_checkpointing: bool = False

    learning_rate: Above
    learning_rates: dict[Part, Above] = Field(default_factory=dict)
    """Peaks for parts of the model that differ from learning_rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_tokens: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Rounded up to whole steps."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps over which `wsd` decays at the end."""
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The decay ends at this share of the peak."""
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), strict=False)
    weight_decay: NotNegative = 0.1
    clip: Above = 1.0

    train: What | list[Phase] = "all"
    """What is trained: all, the routers, the routers and their experts; or one after the other."""
    balance: Balance = Balance()
    noise: bool = False
    """Noisy top-k (arXiv 1701.06538, eq. 4) in training, with noise weights that start at 0 and are dropped after."""
    distill: Distill | None = None

    eval_tokens: Positive = 1 << 20
    """Tokens between evaluations on the validation windows; rounded up to whole steps."""
    eval_windows: Positive = 2
    """Validation windows per domain in each of them."""
    save_every: Positive = 50
    """Steps between checkpoints."""
    keep: Positive = 2
    """Checkpoints kept, the newest."""
    keep_every: Positive | None = None
    """Steps; checkpoints at multiples of it are kept until the run is finished, to export them."""
    keep_finished: bool = False
    """Keep the last checkpoint of the finished run in .scratch, to make the run longer, branch from it or export it.
    It takes 12 to 14 bytes a trained parameter, 3 GB for the demo; without it, training leaves nothing there."""
    guard: Guard = Guard()
    trackers: tuple[Tracker, ...] = Field(default=("tensorboard",), strict=False)
    """Where the log goes besides log.jsonl."""
    expert_log: Literal["brief", "detailed"] = "brief"
    """Load of the experts in each step's record: three numbers a layer, or the tokens of every expert too."""
    seed: Seed = 0

    @property
    def step_tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.step_tokens)

    @property
    def warmup_steps(self) -> int:
        return -(-self.warmup_tokens // self.step_tokens)

    @property
    def eval_every(self) -> int:
        return -(-self.eval_tokens // self.step_tokens)

    @property
    def moves_weights(self) -> bool:
        """Whether evaluations move the domain weights, so that no batch is known before training."""
        return any(getattr(self, field) is not None for field in FIXED)

    @property
    def phases(self) -> list[tuple[int, What]]:
        """(last step, what is trained) of each phase, in order."""
        if isinstance(self.train, str):
            return [(self.steps, self.train)]
        ends, at = [], 0
        for phase in self.train:
            at = self.steps if phase.tokens is None else at + -(-phase.tokens // self.step_tokens)
            ends.append((at, phase.what))
        return ends

    def phase(self, step: int) -> What:
        """What is trained in a step, from 1."""
        return next(what for last, what in self.phases if step <= last)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, entry: Any) -> Any:
        """Defaults that depend on a plug-in's field."""
        for module in plugin.modules("settings").values() if isinstance(entry, dict) else ():
            entry = {**getattr(module, "DEFAULTS", {}).get("pretrain", dict)(entry), **entry}
        return entry

    @model_validator(mode="after")
    def _batch(self) -> Self:
        step = self.micro_batch * self.processes
        if self.batch % step:
            raise ValueError(f"batch = {self.batch} is not a multiple of micro_batch x processes = {step}")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_tokens = {self.warmup_tokens} ({self.warmup_steps} steps) leaves none of the {self.steps} "
                "steps"
            )
        return self

    @model_validator(mode="after")
    def _phases(self) -> Self:
        if isinstance(self.train, list):
            if not self.train or any((phase.tokens is None) != (phase is self.train[-1]) for phase in self.train):
                raise ValueError("train: every phase but the last has `tokens`, and the last has none")
            if (last := [0, *(end for end, _ in self.phases)][-2]) >= self.steps:
                raise ValueError(f"train: the phases before the last take {last} steps, and tokens give {self.steps}")
        return self

    @model_validator(mode="after")
    def _processes(self) -> Self:
        if (self.launcher == "hostfile") != (self.hostfile is not None):
            raise ValueError("launcher: hostfile and `hostfile: FILE` go together")
        if self.processes % self.expert_parallel:
            raise ValueError(
                f"processes = {self.processes} is not a multiple of expert_parallel = {self.expert_parallel}"
            )
        if self.expert_parallel > 1 and self.zero_stage == 0:
            raise ValueError("expert_parallel needs zero_stage 1, 2 or 3: DeepSpeed clips wrongly without ZeRO")
        if self.distill and self.distill.top_n and self.moves_weights:
            raise ValueError(
                f"distill.top_n needs windows that are known before training, and {', '.join(FIXED)} decides them on "
                "the way; leave one of them out"
            )
        if self.balance.loss == "bias" and self.noise:
            raise ValueError("balance.loss: bias and noise: true are two ways to spread tokens; leave one out")
        return self

"""Every knob of every pipeline: the pydantic models of `pipelines.yaml`.

    python -m tasks.settings [pipelines.yaml]      # validate, and print what is defined

Nothing runs before the whole file is valid. An error names the file, the path of the field, the value and what is
allowed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks import sources

FILE = Path("pipelines.yaml")

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="lower-case letters, digits, - and _")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class SettingsError(ValueError):
    """pipelines.yaml is not valid; the message lists every fault."""


def _source(text: str) -> str:
    sources.parse(text)
    return text


SourceText = Annotated[str, AfterValidator(_source)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shape(Frozen):
    """Family and sizes, for plans and checks before anything is downloaded; the names are those of config.json."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    vocab_size: Positive
    tie_word_embeddings: bool = False
    head_dim: Positive | None = None


class Model(Frozen):
    """A dense LLaMA-family checkpoint."""

    source: SourceText
    sha256: Sha256 | None = None
    license: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    shape: Shape | None = None


class Domain(Frozen):
    """One domain of a corpus."""

    source: SourceText
    format: Literal["text", "jsonl", "parquet", "mediawiki"]
    license: str
    sha256: Sha256 | None = None
    sdist: bool = False
    """Let pip prepare a source distribution, which runs the package's own setup.py."""
    text_field: str = "text"
    heldout: Share | None = None
    """Overrides the corpus-wide share of documents held out."""


class Corpus(Frozen):
    """Domains, tokenised with one model's tokenizer."""

    model: Name
    seed: int = 0
    heldout: Share = 0.01
    max_bad: Share = 0.001
    """Share of unreadable records above which a domain fails."""
    shard_tokens: Positive = 1 << 26
    domains: Annotated[dict[Name, Domain], Field(min_length=1)]

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if taken := sorted({"mean", "step", "tokens"} & set(self.domains)):
            raise ValueError(
                f"domains.{taken[0]}: the metrics files have a column of that name; call the domain another"
            )
        return self


class Mixture(Frozen):
    """Domain weights (tasks/mixture)."""

    method: Literal["uniform", "proportional", "explicit", "reference_loss"]
    weights: dict[Name, Annotated[float, Field(ge=0)]] | None = None
    """Needed by `explicit`; the start of `reference_loss` (uniform if absent). Normalised to sum 1."""
    windows: Positive = 8
    """Held-out windows per domain on which `reference_loss` measures the dense model."""

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.method == "explicit" and not self.weights:
            raise ValueError("method `explicit` needs `weights`: {domain: weight}")
        if self.method in {"uniform", "proportional"} and self.weights:
            raise ValueError(f"method `{self.method}` takes no `weights`")
        if self.weights is not None and sum(self.weights.values()) <= 0:
            raise ValueError("`weights` must have a positive sum")
        return self


class Partition(Frozen):
    """Expert construction (tasks/partition): which neurons form an expert, who routes to it, what it is scaled by."""

    method: Literal["random", "clustering", "coactivation", "importance", "moebert", "copy", "activation"]
    experts: Positive
    """Routed experts E."""
    top_k: Positive
    """Routed experts per token, K."""
    shared_experts: Annotated[int, Field(ge=0)] = 0
    """Experts that every token passes."""
    expert_size: Positive | None = None
    """Neurons per expert; FFN width / (experts + shared_experts) if absent. Free where experts may share neurons."""
    layers: Literal["all", "alternate"] | list[Annotated[int, Field(ge=0)]] = "all"
    """Which layers become sparse; the others stay dense."""
    target: Literal["auto", "mixtral", "granitemoe", "granitemoeshared", "qwen2_moe", "qwen3_moe"] = "auto"
    """Class of the result (its model_type); auto: the first that can express it."""
    router: Literal["random", "centroid", "analytical", "regression"] | None = None
    """How the router starts; regression where there is calibration text for the method anyway, else random."""
    gate: Literal["linear", "tanh"] = "linear"
    """tanh: train with the paper's two-layer gate, and fit a linear router to it on export."""
    scale: Literal["unit", "paper", "mean", "variance", "calibrated"] = "unit"
    """Sum of the routed weights, folded into down_proj: unit K (what the dense sum wants), paper E/K, mean E, variance
    sqrt(K E), calibrated by least squares on the dense output, layer by layer."""
    router_std: Annotated[float, Field(gt=0)] = 0.1
    """Standard deviation of the router's logits over experts: small keeps the chosen weights near 1/K each."""
    down_proj: Literal["keep", "refit"] = "keep"
    """refit: least squares of the kept neurons' down-projection on the dense FFN's output."""
    calibration_windows: Positive = 32
    seed: int = 0

    rows: list[Literal["gate", "up", "down"]] | None = None
    """clustering: the weights of a neuron that are clustered; ["up"] if absent."""
    metric: Literal["l2", "cosine"] | None = None
    """clustering: l2 if absent."""
    sharing: Literal["none", "inner", "inter"] | None = None
    """importance: none deals every neuron once; inner lets experts overlap; inter needs shared_experts."""
    common_neurons: Annotated[int, Field(ge=0)] | None = None
    """moebert: the most important neurons, which every expert holds."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """copy: standard deviation of noise on the copies, as a share of each weight matrix's own."""
    reinitialise: Share | None = None
    """copy: share of every copy's neurons that is drawn anew (Drop-Upcycling, arXiv 2502.19261)."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k = {self.top_k} is more than experts = {self.experts}; allowed: 1 to {self.experts}"
            )
        for field, method in _METHOD_OPTIONS.items():
            if getattr(self, field) is not None and self.method != method:
                raise ValueError(f"`{field}` is an option of method `{method}`, not of `{self.method}`")
        if self.shared_experts and not self.may_share:
            raise ValueError(
                f"method `{self.method}` has no shared experts; set shared_experts: 0, or method activation, or "
                "importance with sharing: inter"
            )
        if self.sharing == "inter" and not self.shared_experts:
            raise ValueError("sharing: inter needs shared_experts >= 1, which take what most experts want")
        if isinstance(self.layers, list) and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers = {self.layers} names a layer twice")
        return self

    @property
    def may_share(self) -> bool:
        return self.method == "activation" or self.sharing == "inter"

    @property
    def may_overlap(self) -> bool:
        """True if a neuron may stand in several experts or in none, which makes expert_size free."""
        return self.method in {"moebert", "copy"} or self.sharing == "inner"

    def sparse_layers(self, layers: int) -> list[int]:
        """The layers, of so many, that become sparse. Raises ValueError for one that is not there."""
        if self.layers == "all":
            return list(range(layers))
        if self.layers == "alternate":
            return list(range(1, layers, 2))
        if wrong := [layer for layer in self.layers if layer >= layers]:
            raise ValueError(f"partition.layers: {wrong} are not there; the model has layers 0 to {layers - 1}")
        return sorted(self.layers)

    def check_width(self, width: int) -> int:
        """Neurons per expert for an FFN of `width`. Raises ValueError listing the sizes that fit."""
        if self.method == "copy":
            return self._check_copies(width)
        if self.may_overlap:
            return self._check_overlap(width)
        total = self.experts + self.shared_experts
        if width % total:
            fits = [n for n in range(2, min(width, 257)) if width % n == 0]
            raise ValueError(
                f"experts + shared_experts = {self.experts} + {self.shared_experts} = {total} does not divide "
                f"the FFN width {width}; totals that do: {', '.join(map(str, fits))}"
            )
        if self.expert_size not in (None, width // total):
            raise ValueError(
                f"expert_size = {self.expert_size}, but method `{self.method}` places every neuron once: "
                f"{width} / {total} = {width // total}; leave expert_size out"
            )
        return width // total

    def _check_copies(self, width: int) -> int:
        """A copy may be cut into slices (arXiv 2410.07524, granular upcycling); whole copies are routed together."""
        size = self.expert_size or width
        slices = width // size if size and width % size == 0 else 0
        if not slices or self.experts % slices or self.top_k % slices:
            fits = [width // n for n in range(1, width + 1) if width % n == self.experts % n == self.top_k % n == 0]
            raise ValueError(
                f"expert_size = {size}: copies of an FFN of {width} neurons are cut into width / expert_size slices, "
                f"which must divide experts = {self.experts} and top_k = {self.top_k}; sizes that do: "
                f"{', '.join(map(str, fits))}"
            )
        return size

    def _check_overlap(self, width: int) -> int:
        size = self.expert_size or width // self.experts
        common = self.common_neurons or 0
        largest = common + (width - common) // self.experts if self.method == "moebert" else width
        if not common < size <= largest:
            raise ValueError(
                f"expert_size = {size}: method `{self.method}` with experts = {self.experts} and common_neurons = "
                f"{common} takes {common + 1} to {largest} of the {width} neurons"
            )
        return size


_METHOD_OPTIONS = {
    "rows": "clustering",
    "metric": "clustering",
    "sharing": "importance",
    "common_neurons": "moebert",
    "noise": "copy",
    "reinitialise": "copy",
}


class Pretrain(Frozen):
    """Continual pre-training (tasks/pretrain)."""

    tokens: Positive
    """Training tokens; rounded up to whole steps of batch x seq_len."""
    seq_len: Positive
    batch: Positive
    """Sequences per optimizer step, over all processes."""
    micro_batch: Positive = 1
    """Sequences per forward pass and process; batch must be a multiple of micro_batch x processes."""
    processes: Positive = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 where the processor has it."""
    gradient_checkpointing: bool = False
    learning_rate: Annotated[float, Field(gt=0)]
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Cosine decay ends at this share of learning_rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    balance_loss: Annotated[float, Field(ge=0)] = 0.01
    """Coefficient of the Switch load-balancing loss (transformers' router_aux_loss_coef)."""
    dynamic: bool = False
    """Dynamic batch loading: move the domain weights towards domains above their reference loss."""
    eval_every: Positive = 50
    """Steps between held-out evaluations."""
    eval_windows: Positive = 2
    """Held-out windows per domain in each of them."""
    save_every: Positive = 50
    seed: int = 0

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.batch * self.seq_len))

    @model_validator(mode="after")
    def _batch(self) -> Self:
        step = self.micro_batch * self.processes
        if self.batch % step:
            raise ValueError(f"batch = {self.batch} is not a multiple of micro_batch x processes = {step}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} leaves none of the {self.steps} steps")
        return self


class Task(Frozen):
    """An lm-eval task: over a local file, described by tasks/evaluate/harness/<name>.yaml, or a hub task by name."""

    name: Name
    source: SourceText | None = None
    sha256: Sha256 | None = None
    license: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    limit: Positive | None = None


class Evaluate(Frozen):
    """Evaluation and report (tasks/evaluate)."""

    seq_len: Positive
    windows: Positive = 8
    """Held-out windows of seq_len tokens per domain."""
    batch: Positive = 4
    tasks: list[Task] = []


class Pipeline(Frozen):
    model: Name
    corpus: Name
    mixture: Mixture
    partition: Partition
    pretrain: Pretrain
    evaluate: Evaluate

    @model_validator(mode="after")
    def _reference(self) -> Self:
        if self.pretrain.dynamic and self.mixture.method != "reference_loss":
            raise ValueError("pretrain.dynamic needs reference losses: set mixture.method: reference_loss")
        return self


class Settings(Frozen):
    """The whole of pipelines.yaml. `deployments` are Prefect's; Prefect checks what this file does not."""

    models: dict[Name, Model]
    corpora: dict[Name, Corpus]
    pipelines: dict[Name, Pipeline]
    deployments: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, corpus in self.corpora.items():
            _known(f"corpora.{name}.model", corpus.model, self.models)
        for name, pipeline in self.pipelines.items():
            _known(f"pipelines.{name}.model", pipeline.model, self.models)
            _known(f"pipelines.{name}.corpus", pipeline.corpus, self.corpora)
            domains = self.corpora[pipeline.corpus].domains
            for domain in pipeline.mixture.weights or {}:
                _known(f"pipelines.{name}.mixture.weights", domain, domains)
            if shape := self.models[pipeline.model].shape:
                try:
                    pipeline.partition.check_width(shape.intermediate_size)
                except ValueError as error:
                    raise ValueError(f"pipelines.{name}.partition: {error}") from None
        for i, deployment in enumerate(self.deployments):
            target = (deployment.get("parameters") or {}).get("pipeline")
            _known(f"deployments[{i}].parameters.pipeline", target, self.pipelines)
        return self

    def pipeline(self, name: str) -> Pipeline:
        return self._get("pipelines", name)

    def corpus(self, name: str) -> Corpus:
        return self._get("corpora", name)

    def model(self, name: str) -> Model:
        return self._get("models", name)

    def _get(self, section: str, name: str) -> Any:
        entries = getattr(self, section)
        if name not in entries:
            raise SettingsError(f"{FILE}: {section} has no {name!r}; it has {', '.join(entries) or 'none'}")
        return entries[name]


def load(path: Path | str = FILE) -> Settings:
    """Read and validate pipelines.yaml. Raises SettingsError listing every fault."""
    from ruamel.yaml import YAML, YAMLError  # YAML 1.2, as DVC reads it: 2e-4 is a number, a repeated key is an error

    path = Path(path)
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"{path}: not found; run from the project's root, where pipelines.yaml lies") from None
    except YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    return validate(raw, path=path)


def validate(raw: Any, *, path: Path | str = FILE) -> Settings:
    """Validate the content of pipelines.yaml, or of a recipe. Raises SettingsError listing every fault."""
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{path}: {_fault(fault)}" for fault in error.errors())) from None


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; allowed here: {', '.join(_allowed(fault['loc']))}"
    value = fault["input"]
    shown = "" if isinstance(value, dict | list) or fault["type"] == "missing" else f" = {value!r}"
    return f"{where}{shown}: {message}" if where else message


def _allowed(loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that holds the field at `loc`."""
    kind: Any = Settings
    for part in loc[:-1]:
        if part in getattr(kind, "model_fields", {}):
            kind = kind.model_fields[part].annotation
        inner = (kind, *get_args(kind))  # dict[str, Pipeline] and Shape | None too
        kind = next((k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)), kind)
    return list(getattr(kind, "model_fields", {}))


def _known(field: str, name: Any, defined: dict[str, Any]) -> None:
    if name not in defined:
        raise ValueError(f"{field} = {name!r} is not defined; defined: {', '.join(defined) or 'none'}")


def main() -> int:
    """Print the names that a settings file defines, or its faults."""
    try:
        settings = load(*sys.argv[1:2])
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for section in ("models", "corpora", "pipelines"):
        print(f"{section}: {', '.join(getattr(settings, section))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

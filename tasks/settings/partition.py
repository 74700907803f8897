"""The section `partition` of a pipeline: how experts are constructed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.architectures import SPARSE
from tasks.settings.fields import LARGEST, Above, Frozen, NotNegative, Positive, Seed, Share, choice, extended

METHODS = sorted(file.stem for file in Path(__file__).parents[1].glob("partition/methods/[a-z]*.py"))
"""A method is a file of its own, found by its name."""
if TYPE_CHECKING:
    Method = str
    Target = str
else:
    Method = choice("partition.method", *METHODS)
    Target = Literal[("auto", *SPARSE)]
Engine = Literal["llama.cpp", "vllm", "sglang", "transformers", "transformers4"]


@extended("partition")
class Partition(Frozen):
    """Expert construction (tasks/partition): which neurons form an expert, who routes to it, what it is scaled by."""

    method: Method
    experts: Positive
    """Routed experts E."""
    top_k: Positive
    """Routed experts per token, K."""
    elastic: Annotated[list[Positive], Field(min_length=2)] | None = None
    """Every top_k that the result must serve, `top_k` among them: an expert weighs the same, however many are chosen.
    Fit and training see all of them."""
    shared_experts: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Experts that every token passes."""
    expert_size: Positive | None = None
    """Neurons per expert; FFN width / (experts + shared_experts) if absent. Free where experts may share neurons."""
    layers: Literal["all", "alternate"] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = "all"
    """Which layers become sparse; the others stay dense."""
    target: Target = "auto"
    """Class of the result (its model_type); auto: the first that can express it and that all `engines` load."""
    engines: list[Engine] = Field(default=["llama.cpp", "vllm", "transformers"])
    """Inference engines that must load the result (tasks/engines/table.py); llama.cpp stands for Ollama too,
    transformers for version 5. A shape that one of them cannot load is refused before anything runs."""
    router: Literal["random", "centroid", "analytical", "regression"] | None = None
    """How the router starts; regression where there is calibration text for the method anyway, else random."""
    gate: Literal["linear", "tanh"] = "linear"
    """tanh: train with the paper's two-layer gate, and fit a linear router to it on export."""
    scale: Literal["unit", "paper", "mean", "variance", "calibrated"] = "unit"
    """Sum of the routed weights, folded into down_proj: unit K (what the dense sum wants), paper E/K, mean E, variance
    sqrt(K E), calibrated by least squares on the dense output, layer by layer."""
    router_std: Above | None = None
    """Standard deviation of the router's logits over experts: small keeps the weights of the chosen near each other.
    0.1 if absent, with `elastic` 0.02: with all experts on, what their weights differ by is all that is lost."""
    down_proj: Literal["keep", "refit"] = "keep"
    """refit: least squares of the kept neurons' down-projection on the dense FFN's output."""
    fit_passes: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """After the refit, train all weights of the experts on the same target, layer by layer, so many times over the
    calibration windows."""
    calibration_windows: Positive = 32
    seed: Seed = 0

    rows: list[Literal["gate", "up", "down"]] | None = None
    """clustering: the weights of a neuron that are clustered; ["up"] if absent."""
    metric: Literal["l2", "cosine"] | None = None
    """clustering: l2 if absent."""
    sharing: Literal["none", "inner", "inter"] | None = None
    """importance: none deals every neuron once; inner lets experts overlap; inter needs shared_experts."""
    common_neurons: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """moebert: the most important neurons, which every expert holds."""
    noise: NotNegative | None = None
    """copy: standard deviation of noise on the copies, as a share of each weight matrix's own."""
    reinitialise: Share | None = None
    """copy: share of every copy's neurons that is drawn anew (Drop-Upcycling, arXiv 2502.19261)."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k = {self.top_k} is more than experts = {self.experts}; allowed: 1 to {self.experts}"
            )
        self._check_elastic()
        if self.fit_passes and self.down_proj != "refit":
            raise ValueError(f"fit_passes = {self.fit_passes} goes on from the refit; set down_proj: refit")
        for field, method in _METHOD_OPTIONS.items():
            if getattr(self, field) is not None and self.method != method:
                raise ValueError(f"`{field}` is an option of method `{method}`, not of `{self.method}`")
        if self.shared_experts and not self.may_share:
            raise ValueError(
                f"method `{self.method}` has no shared experts; set shared_experts: 0, or method activation, or "
                "importance with sharing: inter"
            )
        if self.method == "token_clusters" and self.top_k != 1:
            raise ValueError(
                f"top_k = {self.top_k}: experts of method `token_clusters` overlap, and a token passes one; set "
                "top_k: 1 and a larger expert_size"
            )
        if self.sharing == "inter" and not self.shared_experts:
            raise ValueError("sharing: inter needs shared_experts >= 1, which take what most experts want")
        if isinstance(self.layers, list) and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers = {self.layers} names a layer twice")
        if len(set(self.engines)) != len(self.engines):
            raise ValueError(f"engines = {self.engines} names an engine twice")
        return self

    def _check_elastic(self) -> None:
        if self.elastic is None:
            return
        given = f"elastic = {self.elastic}"
        if self.elastic != sorted(set(self.elastic)) or self.elastic[-1] > self.experts:
            raise ValueError(f"{given}: name each top_k once, in ascending order, from 1 to experts = {self.experts}")
        if self.top_k not in self.elastic:
            raise ValueError(f"{given} leaves out top_k = {self.top_k}, which is used where none is named; add it")
        if self.may_overlap:
            raise ValueError(
                f"{given}: experts of method `{self.method}` overlap, so no top_k gives the dense sum; take method "
                "activation, clustering, coactivation or random"
            )
        if self.scale != "unit":
            raise ValueError(f"{given}: each expert weighs 1, so that their sum is the dense FFN; set scale: unit")
        if self.gate != "linear":
            raise ValueError(f"{given}: the weights of a tanh gate sum to 1 over the chosen; set gate: linear")

    @property
    def all_chosen(self) -> bool:
        """True if every token gets every expert, so that there is nothing to choose."""
        return self.top_k == self.experts and not self.elastic

    def active(self, width: int, *, top_k: int | None = None) -> float:
        """Share of an FFN of `width` neurons that a token passes with `top_k` routed experts; the setting if None."""
        return (self.shared_experts + (top_k or self.top_k)) * self.check_width(width) / width

    @property
    def may_share(self) -> bool:
        return self.method in {"activation", "token_clusters"} or self.sharing == "inter"

    @property
    def may_overlap(self) -> bool:
        """True if a neuron may stand in several experts or in none, which makes expert_size free."""
        return self.method in {"moebert", "copy", "token_clusters"} or self.sharing == "inner"

    def sparse_layers(self, layers: int) -> list[int]:
        """The layers, of so many, that become sparse. Raises ValueError for one that is not there."""
        if self.layers == "all":
            return list(range(layers))
        if self.layers == "alternate":
            return list(range(1, layers, 2))
        if wrong := [layer for layer in self.layers if layer >= layers]:
            raise ValueError(f"layers: {wrong} are not there; the model has layers 0 to {layers - 1}")
        return sorted(self.layers)

    def check_width(self, width: int) -> int:
        """Neurons per expert for an FFN of `width`. Raises ValueError listing the sizes that fit."""
        if self.method == "copy":
            return self._check_copies(width)
        if self.method == "token_clusters":
            return self._check_token_clusters(width)
        if self.may_overlap:
            return self._check_overlap(width)
        total = self.experts + self.shared_experts
        if width % total:
            fits = [n for n in range(2, min(width, 257)) if width % n == 0]
            raise ValueError(
                f"experts + shared_experts = {self.experts} + {self.shared_experts} = {total} does not divide "
                f"the FFN width {width} (intermediate_size); totals that do: {', '.join(map(str, fits))}"
            )
        if self.expert_size not in (None, width // total):
            raise ValueError(
                f"expert_size = {self.expert_size}, but method `{self.method}` places every neuron once: "
                f"{width} / {total} = {width // total}; leave expert_size out"
            )
        return width // total

    def pruned_width(self, width: int, *, layers: int) -> int:
        """FFN width of the pruned baseline, which is as many neurons as a token passes in a sparse layer.

        Raises ValueError if there is no such model: some of its `layers` stay dense, or nothing would be left out.
        """
        fix = "set partition.layers: all, or control: none"
        if len(self.sparse_layers(layers)) < layers:
            raise ValueError(
                f"pruned: partition.layers = {self.layers!r} keeps layers as wide as they are, and a dense class "
                f"has one intermediate_size for all; {fix}"
            )
        active = (self.shared_experts + self.top_k) * self.check_width(width)
        if active >= width:
            raise ValueError(
                f"pruned: method `{self.method}` has {active} active neurons a layer and the FFN {width}, so the "
                "dense model of that size is the parent or larger; set control: none"
            )
        return active

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

    def _check_token_clusters(self, width: int) -> int:
        """One routed expert at a time beside the shared ones, and neurons enough for both."""
        largest = width // (self.shared_experts + 1)
        if self.expert_size is None or self.expert_size > largest:
            raise ValueError(
                f"expert_size = {self.expert_size}: method `token_clusters` with shared_experts = "
                f"{self.shared_experts} takes 1 to {largest}, an intermediate_size of {width} over "
                f"{self.shared_experts} + 1; half of the FFN is active at {max(largest // 2, 1)}"
            )
        return self.expert_size

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

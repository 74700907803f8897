"""The section `mixture` of a pipeline: domain weights (tasks/mixture)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from tasks import plugin
from tasks.settings.fields import Above, Frozen, Name, NotNegative, Positive, Seed, SeqLen, choice, extended

SMALLEST = 1e-6
"""Weights that sum to less are a slip of the exponent, and lose digits when they are normalised."""
PROXIES, SWARMS, ONLINE, TARGETED, PRIOR = (
    plugin.choices(f"mixture.{field}") for field in ("proxy", "swarm", "seeds", "target", "weights")
)
"""Methods of plug-ins that take a field: they train proxies, fit a law to a swarm of them, estimate while one trains,
lower the loss of a target, or start from a prior, of which they take the logarithm."""
WEIGHTED = ("explicit", "reference_loss", *PRIOR)
"""Methods that take `weights`."""
MEAN = "mean"
if TYPE_CHECKING:
    Method = str
else:
    Method = choice(
        "mixture.method",
        *("uniform", "proportional", "temperature", "unimax", "llama", "sheared_llama", "llama_moe", "explicit"),
        "reference_loss",
    )


class ProxyShape(Frozen):
    """Sizes of a small LLaMA that has the parent's tokenizer, by the fields of config.json."""

    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] = 4
    num_attention_heads: Positive = 4
    num_key_value_heads: Positive = 2

    @model_validator(mode="after")
    def _heads(self) -> Self:
        heads, width = self.num_attention_heads, self.hidden_size
        if width % (2 * heads):
            raise ValueError(
                f"hidden_size = {width} is not a multiple of 2 x num_attention_heads = {2 * heads}: rotary positions "
                "turn pairs of numbers"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {self.num_key_value_heads}"
            )
        return self


class Proxy(Frozen):
    """The model on which a method tries mixes, and one training of it."""

    model: Literal["scratch", "parent", "student"]
    """scratch: a small random LLaMA with the parent's tokenizer. parent: the dense model. student: the split model
    itself, which asks what healing lacks."""
    layers: Positive | None = None
    """parent, student: the first so many layers, with the final norm and head; absent: all."""
    shape: ProxyShape | None = None
    """scratch alone; a LLaMA of four layers of 128 if absent."""
    tokens: Positive
    """Of one training; rounded up to whole steps of batch x seq_len."""
    seq_len: SeqLen = 256
    batch: Positive = 8
    """Methods that estimate while it trains round it up to a multiple of the number of domains."""
    micro_batch: Positive | None = None
    """Sequences per forward pass; the batch if absent."""
    learning_rate: Above
    windows: Positive = 8
    """Validation windows of each domain on which a proxy is measured."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _model(self) -> Self:
        if self.model == "scratch" and self.layers is not None:
            raise ValueError("layers = N keeps the first layers of a trained model; give `shape` to model `scratch`")
        if self.model != "scratch" and self.shape is not None:
            raise ValueError(f"shape is of model `scratch`; `{self.model}` has sizes of its own: leave it out")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch = {self.batch} is not a multiple of micro_batch = {self.micro_batch}")
        return self

    def holding(self, domains: int) -> Proxy:
        """The same with a batch, rounded up, in which so many domains are equally often. It is one micro-batch, if
        nothing else is said."""
        each = math.lcm(domains, self.micro_batch or 1)
        batch = -(-self.batch // each) * each
        return self.model_copy(update={"batch": batch, "micro_batch": self.micro_batch or batch})

    @property
    def sizes(self) -> ProxyShape:
        """Of a model from scratch."""
        return self.shape or ProxyShape()


class Swarm(Frozen):
    """Independent trainings of the proxy on different mixes, to which a law is fitted."""

    units: Annotated[int, Field(gt=0, le=100_000)]
    """Trainings; more can be added later, and those that are done are kept."""
    workers: Positive = 1
    """Trainings at once on this machine. Cores and GPUs are shared out among them."""

    @staticmethod
    def least(domains: int) -> int:
        """Units without which a law over so many domains can't be fitted and held out.

        The log-linear law has a constant for each domain and one more; a fit that leaves out a fifth of the units
        must still see more than that.
        """
        return 2 * (domains + 1)

    def require(self, domains: int) -> None:
        """Raise ValueError, which begins with the field, if there are fewer."""
        if self.units < (least := self.least(domains)):
            raise ValueError(
                f"units = {self.units}: a law over {domains} domains has {domains + 1} constants, and takes {least} "
                f"units or more; set it to {least}, better {2 * least}"
            )


@extended("mixture")
class Mixture(Frozen):
    """Domain weights (tasks/mixture)."""

    method: Method
    weights: dict[Name, NotNegative] | None = None
    """Of every domain; normalised. Needed by `explicit`; the start of `reference_loss` (uniform if absent); the prior
    of an estimator (proportional if absent)."""
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """`temperature` alone, which needs it: a domain's share is proportional to its tokens to this power."""
    max_epochs: Above = 4.0
    """No domain is given so large a share that training reads it more often than this (arXiv 2305.16264: up to four
    epochs are nearly as good as new text). It binds the weights at the start, not those that evaluations move."""
    windows: Positive = 8
    """Validation windows per domain on which `reference_loss` measures the dense model."""
    target: Annotated[
        Annotated[Name, Tag("name")] | Annotated[dict[Name, NotNegative], Tag("mapping")],
        Discriminator(lambda value: "mapping" if isinstance(value, dict) else "name"),
    ] = MEAN
    """Methods with a proxy: whose loss is to fall. `mean` of the trained domains, a domain, or {domain: weight}. An
    `unseen` domain may be one; the weights are then chosen on its test text, so its scores are no test any more."""
    proxy: Proxy | None = None
    """Methods that train proxies, which need it."""
    swarm: Swarm | None = None
    """Methods that fit a law to proxy runs, which need it."""
    seeds: Positive = 1
    """Methods that estimate while a proxy trains: trainings from `proxy.seed` on, whose mean is taken and whose
    deviation is shown."""

    def targets(self, trained: list[str]) -> dict[str, float]:
        """What is minimised, as {domain: weight} of sum 1."""
        if self.target == MEAN:
            return dict.fromkeys(trained, 1 / len(trained))
        if isinstance(self.target, str):
            return {self.target: 1.0}
        total = sum(self.target.values())
        return {domain: weight / total for domain, weight in self.target.items() if weight > 0}

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.method == "explicit" and not self.weights:
            raise ValueError("method `explicit` needs `weights`: {domain: weight}")
        if self.method == "temperature" and self.alpha is None:
            raise ValueError("method `temperature` needs `alpha`: 0 is uniform, 1 proportional, 0.5 between")
        if self.method != "temperature" and self.alpha is not None:
            raise ValueError(f"method `{self.method}` takes no `alpha`; it is the exponent of `temperature`")
        if self.method not in WEIGHTED and self.weights:
            raise ValueError(f"method `{self.method}` takes no `weights`")
        if self.weights is not None and sum(self.weights.values()) < SMALLEST:
            raise ValueError(f"`weights` must have a positive sum, of {SMALLEST} at least")
        if self.method in PRIOR and (zeros := [name for name, w in (self.weights or {}).items() if w == 0]):
            raise ValueError(
                f"weights.{zeros[0]} = 0: they are the prior of method `{self.method}`, which takes its logarithm; "
                f"give {', '.join(zeros)} a small weight, or leave {'them' if zeros[1:] else 'it'} out of the corpus"
            )
        return self

    @model_validator(mode="after")
    def _proxy(self) -> Self:
        for field, methods in (("proxy", PROXIES), ("swarm", SWARMS)):
            given = getattr(self, field) is not None
            if given and self.method not in methods:
                raise ValueError(f"method `{self.method}` takes no `{field}`, which is of {', '.join(methods)}")
            if not given and self.method in methods:
                example = "{model: student, tokens: N, learning_rate: X}" if field == "proxy" else "{units: N}"
                raise ValueError(f"method `{self.method}` needs `{field}`: {example}")
        for field in plugin.fields("mixture"):
            methods = plugin.choices(f"mixture.{field}")
            if getattr(self, field) is not None and self.method not in methods:
                raise ValueError(f"method `{self.method}` takes no `{field}`, which is of {', '.join(methods)}")
        if self.seeds != 1 and self.method not in ONLINE:
            raise ValueError(f"method `{self.method}` takes no `seeds`, which is of {', '.join(ONLINE)}")
        if self.method not in TARGETED and self.target != MEAN:
            raise ValueError(f"method `{self.method}` takes no `target`, which is of {', '.join(TARGETED)}")
        if not isinstance(self.target, str) and sum(self.target.values()) < SMALLEST:
            raise ValueError(f"`target` must have weights of a positive sum, of {SMALLEST} at least")
        return self

"""The setting `pretrain.dynamic`, what does not go with it, and the evaluations that suit it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tasks.settings.fields import Above, Frozen, Name, Positive

if TYPE_CHECKING:
    from tasks.settings import Corpus, Pipeline, Pretrain

MOVES, FEW_MOVES = 16, 8
"""Evaluations of a run, unless it says otherwise, and how many are too few."""


class Fit(Frozen):
    """A family's losses by size, from which f(N) = a / N^b + c predicts what a domain's should be."""

    losses: dict[Name, list[Above]]
    """Domain -> losses at `sizes`, nats per token."""
    sizes: Annotated[list[Positive], Field(min_length=3)]
    """Parameters of the models measured."""
    size: Positive | None = None
    """Parameters to predict for; the split model's active ones if absent."""

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        for domain, losses in self.losses.items():
            if len(losses) != len(self.sizes):
                raise ValueError(f"losses.{domain} has {len(losses)} numbers for {len(self.sizes)} sizes")
        if len(set(self.sizes)) < 3:
            raise ValueError(f"sizes = {self.sizes}: a law of three constants needs three different sizes or more")
        return self


class Dynamic(Frozen):
    """Dynamic batch loading: at each evaluation, move domain weights towards domains above their reference loss."""

    rule: Literal["paper", "code"] = "paper"
    """Sheared-LLaMA's, as in its paper (excess clipped at 0), or as in its code (not clipped, smoothed by 1e-4)."""
    references: Literal["parent"] | dict[Name, Above] | Fit = "parent"
    """The dense parent's losses on the same windows, given ones, or a scaling fit."""
    within: Annotated[float, Field(ge=1, le=1e30)] = 4.0
    """Each weight stays between a fourth and four times its share at the start: a domain whose reference is out of
    reach would take all."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the old weights in the new ones: by 0.5 an evaluation moves them half as far as the rule says."""


def evaluations(entry: Mapping[str, Any]) -> dict[str, int]:
    """`eval_tokens` and `eval_windows` that suit the budget: 16 evaluations, with as many windows as take a 32nd of
    the tokens between two, 2 to 8.

    Args:
        entry: the section `pretrain` as it stands in the file, not yet valid.
    """
    tokens, seq_len = entry.get("tokens"), entry.get("seq_len")
    if entry.get("dynamic") is None or not (isinstance(tokens, int) and isinstance(seq_len, int)):
        return {}
    if tokens < 1 or seq_len < 1:  # refused later
        return {}
    between = entry.get("eval_tokens", max(tokens // MOVES, 1))
    windows = between // (32 * seq_len) if isinstance(between, int) else 0
    return {"eval_tokens": between, "eval_windows": min(max(windows, 2), 8)}


FIELDS = {"pretrain": {"dynamic": (Dynamic | None, None)}}
CHOICES = {"pretrain.moves_weights": ("dynamic",)}
DEFAULTS = {"pretrain": evaluations}


def faults(pipeline: Pipeline, *, corpus: Corpus, **_: Any) -> Iterator[str]:
    """References that nothing measures, or that are not of exactly the corpus's domains."""
    pretrain: Any = pipeline.pretrain
    if pretrain.dynamic is None:
        return
    references = pretrain.dynamic.references
    if references == "parent":
        if pipeline.mixture.method != "reference_loss":
            yield "pretrain.dynamic.references: parent needs the parent's losses: set mixture.method: reference_loss"
        return
    fit = isinstance(references, Fit)
    names: Iterable[str] = references.losses if fit else references
    if fault := corpus.other_domains(names, name=pipeline.corpus):
        yield f"pretrain.dynamic.references{'.losses' if fit else ''} {fault}"


def warnings(pretrain: Pretrain) -> list[str]:
    """That the weights move too seldom, if they do."""
    moves = -(-pretrain.steps // pretrain.eval_every)  # before the first step, and between two evaluations
    if not pretrain.moves_weights or moves >= FEW_MOVES:
        return []
    better = max(pretrain.tokens // MOVES, 1)
    return [
        f"pretrain.dynamic: the weights move at {moves} evaluations alone, by a whole excess loss each, so "
        f"they jump and come too late; set pretrain.eval_tokens to {better} or less, or leave it out"
    ]

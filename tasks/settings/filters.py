"""The filters of a corpus: a model each, told apart by `rule`; tasks/corpus/filters applies them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from tasks.settings.fields import Frozen, Positive


class Length(Frozen):
    """Documents too short or too long, in characters."""

    rule: Literal["length"]
    min_chars: Positive = 1
    max_chars: Positive | None = None

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is less than min_chars = {self.min_chars}")
        return self


Filter = Length

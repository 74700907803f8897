"""The kinds of fields that the sections of pipelines.yaml share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from tasks import plugin

LARGEST = 1 << 53
"""The largest integer that a float64, and so JSON anywhere, holds exactly."""

Name = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100, description="lower-case letters, digits, - and _")
]
"""It names files and folders, which may have 255 bytes."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
"""What training computes with is float32, which ends at 3e38."""
Above = Annotated[float, Field(gt=0, le=1e30)]
SeqLen = Annotated[int, Field(ge=2, lt=1 << 31)]
"""Tokens of a window. Each but the first is predicted, so 1 predicts nothing; positions in a window are int32."""
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""What every generator here takes: torch's, numpy's and scipy's."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=BaseModel)


def extended(section: str) -> Callable[[type[Section]], type[Section]]:
    """Class decorator: add the fields that plug-ins have for this section of pipelines.yaml.

    A plug-in reads its own field of the section; the core has no name for it.
    """

    def extend(core: type[Section]) -> type[Section]:
        added: dict[str, Any] = plugin.fields(section)
        if taken := sorted(added.keys() & core.model_fields.keys()):
            raise ValueError(f"a plug-in's {section}.{taken[0]} is a field of the core already")
        return create_model(core.__name__, __base__=core, __module__=core.__module__, __doc__=core.__doc__, **added)

    return extend


def choice(field: str, *values: str) -> Any:
    """The annotation of a setting with a fixed set of values: the core's, then those of plug-ins."""
    return Literal[(*values, *plugin.choices(field))]

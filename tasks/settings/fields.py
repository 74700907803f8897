"""The kinds of fields that the sections of pipelines.yaml share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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

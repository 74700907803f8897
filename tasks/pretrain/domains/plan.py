"""What a job says of the domain weights that it is to estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from tasks.settings.fields import Above, Frozen, Name, Positive


class DoReMi(Frozen):
    """Weigh the loss of each token by its domain, and move the weights by the excess over a reference model."""

    method: Literal["doremi"] = "doremi"
    reference: str
    """The folder of a frozen model that has the same vocabulary."""
    step_size: Above = 1.0
    """How far an excess of one nat moves the logarithm of a weight."""


class DoGE(Frozen):
    """Move the weights by products of the domains' gradients, and train by the weighted sum of the gradients."""

    method: Literal["doge"] = "doge"
    target: dict[Name, Above] | None = None
    """Domains whose loss is to fall, on held-out windows; absent: every domain's, each helped by the others."""


class Aioli(Frozen):
    """Change the mix of the batches by sweeps over mixes of mostly one domain, and the validation losses between."""

    method: Literal["aioli"] = "aioli"
    updates: Positive
    """The steps are divided into so many rounds; each begins with its sweeps and goes on with the updated mix."""
    sweeps: Positive = 4
    sweep_steps: Positive = 4
    """Steps on the mix about one domain."""
    target: dict[Name, Above] | None = None
    """Domains whose loss is to fall; absent: every trained one's, equally."""


Plan = Annotated[DoReMi | DoGE | Aioli, Field(discriminator="method")]


def normalised(target: Mapping[str, float]) -> dict[str, float]:
    """The weights of a target with sum 1."""
    total = sum(target.values())
    return {domain: weight / total for domain, weight in target.items()}

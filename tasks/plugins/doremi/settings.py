"""The method `doremi` of the section `mixture`, and the settings that it takes."""

from tasks.settings.fields import Above, Frozen, Positive


class DoReMi(Frozen):
    """What DoReMi leaves to its user."""

    rounds: Positive = 1
    """In each, the last estimate is the mix that the reference is trained on."""
    step_size: Above = 1.0
    """How far an excess of one nat moves the logarithm of a weight; lower it if one domain takes all."""


FIELDS = {"mixture": {"doremi": (DoReMi | None, None)}}
CHOICES = {
    "mixture.method": ("doremi",),
    "mixture.proxy": ("doremi",),
    "mixture.seeds": ("doremi",),
    "mixture.weights": ("doremi",),
    "mixture.doremi": ("doremi",),
}
"""Beside its name: the fields of `mixture` that it takes."""

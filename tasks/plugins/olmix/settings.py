"""The method `olmix` of the section `mixture`, and the settings that it takes."""

CHOICES = {
    "mixture.method": ("olmix",),
    "mixture.proxy": ("olmix",),
    "mixture.swarm": ("olmix",),
    "mixture.weights": ("olmix",),
    "mixture.target": ("olmix",),
}
"""Beside its name: the fields of `mixture` that it takes."""

"""The method `regmix` of the section `mixture`, and the settings that it takes."""

CHOICES = {
    "mixture.method": ("regmix",),
    "mixture.proxy": ("regmix",),
    "mixture.swarm": ("regmix",),
    "mixture.weights": ("regmix",),
    "mixture.target": ("regmix",),
}
"""Beside its name: the fields of `mixture` that it takes."""

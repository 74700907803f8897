"""The method `doge` of the section `mixture`, and the settings that it takes."""

CHOICES = {
    "mixture.method": ("doge",),
    "mixture.proxy": ("doge",),
    "mixture.seeds": ("doge",),
    "mixture.target": ("doge",),
}
"""Beside its name: the fields of `mixture` that it takes."""

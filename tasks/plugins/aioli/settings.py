"""The method `aioli` of the section `mixture`, and the settings that it takes."""

CHOICES = {
    "mixture.method": ("aioli",),
    "mixture.proxy": ("aioli",),
    "mixture.seeds": ("aioli",),
    "mixture.target": ("aioli",),
}
"""Beside its name: the fields of `mixture` that it takes."""

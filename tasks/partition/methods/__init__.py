"""The methods: each turns one dense FFN into neuron indices of experts, and registers itself by name.

    from tasks.partition import methods
    experts_EF = methods.get("activation").split(layer, sizes, options)

A method is one file with one function: (Layer, Sizes, settings.Partition) -> int32 [shared + experts, size], shared
experts first, each row's indices distinct. It is pure: the same layer, options and seed give the same indices. The
file's name is the value of `partition.method`. A plug-in's method is its `method.py`, and its options are `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, get_args

import numpy as np

from tasks import plugin
from tasks.partition.layer import Layer, Sizes
from tasks.settings import Partition

Split = Callable[[Layer, Sizes, Partition], np.ndarray]
Needs = Literal["nothing", "weights", "activations", "gradients"]
NAMES: tuple[str, ...] = get_args(Partition.model_fields["method"].annotation)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and what it looks at: nothing but sizes, the weights, activations on calibration text, or gradients."""

    name: str
    split: Split
    needs: Needs


_METHODS: dict[str, Method] = {}


def method(name: str, *, needs: Needs) -> Callable[[Split], Split]:
    """Register a split function under a name."""

    def register(split: Split) -> Split:
        _METHODS[name] = Method(name=name, split=split, needs=needs)
        return split

    return register


def get(name: str) -> Method:
    """The method of that name; its module is imported on first use. Raises ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"partition.method = {name!r} is not known; known: {', '.join(NAMES)}")
    if plugin.owner("partition.method", name):
        plugin.modules("method")
    else:
        import_module(f"tasks.partition.methods.{name}")
    return _METHODS[name]

"""Lets DeepSpeed's AutoEP find transformers' output recorders by class name, from transformers 5.23 on too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def keyed_by_class_name() -> Iterator[None]:
    """Accept class names as keys of transformers' registry of output recorders while the block runs.

    AutoEP (deepspeed/module_inject/auto_ep_presets/base.py, 0.19.8) points the recorder of router logits to its own
    router, in `transformers.utils.output_capturing._CAN_RECORD_REGISTRY`, by `registry.get(str(cls), default)` and
    `registry[str(cls)] = entry`. Since transformers 5.23 that registry takes the model and names its class itself:
    `get` with two arguments is a TypeError, and an entry written back is filed under `<class 'str'>`.
    """
    from transformers.utils import output_capturing

    registry: Any = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", {}))
    if registry is dict or not issubclass(registry, dict):  # before 5.23, or one that AutoEP leaves alone
        yield
        return
    by_model = {name: getattr(registry, name) for name in ("get", "__setitem__")}

    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else by_model["get"](self, key, *default)

    def set_item(self: Any, key: Any, value: Any) -> None:
        (dict.__setitem__ if isinstance(key, str) else by_model["__setitem__"])(self, key, value)

    registry.get, registry.__setitem__ = get, set_item
    try:
        yield
    finally:
        for name, method in by_model.items():
            setattr(registry, name, method)

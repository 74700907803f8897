"""Rows of a forward pass: what is asked for, or what fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tasks.evaluate import batches


def on(device: str) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device))


def test_a_number_is_taken_as_it_is_and_auto_on_a_processor_is_small() -> None:
    assert batches.fitting(on("cuda"), 7, length=512) == 7
    assert batches.fitting(on("cpu"), "auto", length=512) == batches.ON_CPU


def test_auto_on_a_gpu_is_what_fits_into_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []

    def window_nll(model: Any, ids_BL: Any, *, batch: int) -> None:
        tried.append((batch, *ids_BL.shape))
        if batch > 20:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(batches.loss, "window_nll", window_nll)
    assert 10 < batches.fitting(on("cuda"), "auto", length=512) <= 20
    assert tried[0] == (batches.MOST, batches.MOST, 512)

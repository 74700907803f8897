"""Settings that fit the tiny dense models."""

import pytest

from tasks import settings
from tasks.moe import device


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """The same numbers on every machine, also on one that multiplies in bfloat16."""
    monkeypatch.setattr(device, "has_bfloat16", lambda _: False)


@pytest.fixture
def partition():
    return settings.Partition(method="activation", experts=6, shared_experts=2, top_k=2)

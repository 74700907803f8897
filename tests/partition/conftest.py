"""Settings that fit the tiny dense models."""

import pytest

from tasks import settings


@pytest.fixture
def partition():
    return settings.Partition(method="activation", experts=6, shared_experts=2, top_k=2)

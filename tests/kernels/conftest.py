from collections.abc import Iterator

import problems
import pytest


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    with problems.poisoned_memory():
        yield

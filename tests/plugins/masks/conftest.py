"""The projects of the tests of the stage `control`."""

from __future__ import annotations

from tests.control.conftest import finished, prepared, project

__all__ = ["finished", "prepared", "project"]

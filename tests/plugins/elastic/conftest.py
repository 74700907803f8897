"""The fixtures of training."""

from tests.pretrain.conftest import finished, prepared, process_group, project

__all__ = ["finished", "prepared", "process_group", "project"]

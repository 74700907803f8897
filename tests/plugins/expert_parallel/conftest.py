"""The fixtures of training that these tests share."""

from tests.pretrain.conftest import *  # noqa: F403

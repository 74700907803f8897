"""The tiny projects of the tests of training, which these share."""

from tests.pretrain.conftest import finished, prepared

__all__ = ["finished", "prepared"]

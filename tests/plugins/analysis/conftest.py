"""A finished pipeline, for the tests of what reads one."""

from tests.finished_run import finished, results

__all__ = ["finished", "results"]

"""Measurements: benchmarks, comparisons with peers, and the tuner of the kernels' tiles. Nothing imports it."""

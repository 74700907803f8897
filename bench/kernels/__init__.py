"""Benchmarks of ``moe_kernels``: ``cpu_layer.py`` and ``gpu_layer.py`` are the commands."""

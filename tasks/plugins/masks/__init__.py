"""Pruned baselines of any shape: fewer layers, heads, neurons and hidden dimensions of the parent.

Masks that are trained with the parent say which to keep (Sheared LLaMA, arXiv 2310.06694); magnitude and random are
baselines. Each is a value of `control.method`.
"""

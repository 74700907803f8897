"""Masks that are trained with a model: which layers, heads, neurons and hidden dimensions a smaller one keeps."""

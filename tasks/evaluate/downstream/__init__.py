"""Downstream tasks: where their items are, how models are scored on them, and how models are compared by them."""

"""Continual pre-training of the split model with DeepSpeed."""

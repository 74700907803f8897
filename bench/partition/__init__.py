"""Splits of one model against baselines and peers."""

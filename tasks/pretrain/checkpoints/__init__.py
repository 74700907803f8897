"""Checkpoints of a run: saving, retention, exact resume, and what a finished run keeps."""

"""Inference engines: what each can load, and the files that it reads."""

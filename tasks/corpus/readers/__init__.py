"""Readers of every input format: documents and rejects out of files and datasets, piece by piece."""

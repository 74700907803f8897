"""Duplicates, evaluation items in the text, and the documents that are dropped."""

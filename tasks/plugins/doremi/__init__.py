"""DoReMi (arXiv 2305.10429): domains weigh by their excess loss over a reference model."""

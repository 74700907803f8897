"""Olmix (arXiv 2602.12237): the best mixture by log-linear laws fitted to proxy runs, near a prior."""

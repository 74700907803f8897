"""Filters: which documents a domain drops, and why (docs/filters.md)."""

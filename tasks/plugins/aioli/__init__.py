"""Aioli (arXiv 2411.05735): domains weigh by how far losses fall on mixes of mostly one domain."""

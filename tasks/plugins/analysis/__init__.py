"""Analyses of experts and routers, layer by layer ("A Closer Look into Mixture-of-Experts", arXiv 2406.18219)."""

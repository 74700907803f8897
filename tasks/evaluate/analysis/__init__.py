"""What the experts and routers of a checkpoint are like, layer by layer: an analysis a file, listed in registry.py."""

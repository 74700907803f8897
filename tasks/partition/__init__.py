"""Expert construction: which neurons form an expert, the router that finds it, the checkpoint, and the proof."""

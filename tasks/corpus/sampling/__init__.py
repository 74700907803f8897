"""From shards to batches: windows, packing, sampler, loader."""

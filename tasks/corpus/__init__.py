"""Text becomes shards, shards become batches: readers, deduplication, tokenizer, shards, sampler, loader."""

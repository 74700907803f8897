"""Text becomes shards, shards become batches: readers, deduplication, hold-out, tokenizer, Arrow shards, sampler, loader."""

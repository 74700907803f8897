"""From sources to shards: plan, scan, resolve, tokenise."""

"""Everything that relies on what transformers does not document; its tests say what to do when that changes."""

"""Judge any checkpoint on this disk, beside others, on the same text: `moeforge evaluate`."""

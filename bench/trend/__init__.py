"""The split beside its dense child over the size of the parent."""

"""Domain weights: how large a share of the training tokens each domain of a corpus gets."""

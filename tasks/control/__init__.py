"""The stage `control`: the pruned baseline of a pipeline, trained as its sparse model is."""

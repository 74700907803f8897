"""The stage `control`: the dense child of a pipeline, trained as its sparse model is."""

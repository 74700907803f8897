"""Judge the dense parent, the model right after the split and the trained model, and write the report."""

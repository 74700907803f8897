"""DoGE (arXiv 2310.15393): domains weigh as much as their gradients help the others, or a target."""

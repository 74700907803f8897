"""What a step minimises: cross-entropy, balance losses, distillation from the parent."""

"""The dense parent and the sparse model: stock Hugging Face classes, their sizes, losses and expert loads."""

"""The DeepSpeed engine, and all that touches DeepSpeed's internals."""

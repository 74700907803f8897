"""The tuner of the Triton kernels' tiles."""

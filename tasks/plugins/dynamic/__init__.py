"""Dynamic batch loading (Sheared-LLaMA, arXiv 2310.06694, section 2.2): `pretrain.dynamic`."""

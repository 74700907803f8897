"""RegMix (arXiv 2407.01492): the best of many simulated mixtures by trees fitted to proxy runs."""

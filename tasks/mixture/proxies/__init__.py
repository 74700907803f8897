"""Proxies: models that are trained on a mix, or on many, so that a method sees what domains are worth."""

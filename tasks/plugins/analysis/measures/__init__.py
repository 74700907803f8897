"""The analyses, a file each: a function from one sparse layer to its figures."""

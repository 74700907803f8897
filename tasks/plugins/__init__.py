"""Optional features, a folder each. tasks/plugin.py says which files of a folder the core looks for."""

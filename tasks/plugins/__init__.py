"""Optional features, a folder each. tasks/plugin.py says which files of a folder the core looks for."""

import tasks.settings  # noqa: F401  # reads every plug-in's settings.py, which must be whole by then

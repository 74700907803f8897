"""Validate pipelines.yaml, or the file named, and print what it defines."""

from __future__ import annotations

import sys

from tasks import settings


def main() -> int:
    """Print the names that a settings file defines, or its faults."""
    try:
        loaded = settings.load(*sys.argv[1:2])
    except settings.SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for section in ("models", "corpora", "pipelines"):
        print(f"{section}: {', '.join(getattr(loaded, section))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

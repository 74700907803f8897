"""The environment that Prefect and DVC get from `moeforge`: state inside the project, quiet, no telemetry."""

from __future__ import annotations

import os
from pathlib import Path

PROFILES = Path("~/.prefect/profiles.toml")


def prepare() -> None:
    """Set what the user has not set; call it before anything imports Prefect.

    Prefect's state goes to .prefect/ in the project, unless the user chose a home, a server or a profile with one.
    """
    chosen = {"PREFECT_HOME", "PREFECT_API_URL", "PREFECT_PROFILE"} & set(os.environ)
    if not chosen and not _profile_names_server():
        os.environ["PREFECT_HOME"] = str(Path(".prefect").resolve())
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        # What a worker that was ended leaves is removed by Python's tracker, which would say so.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        # The display shows what the stages print, and an error is printed once, by the command line.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        # Under load a first start, which also creates the database, has taken 27 s; Prefect gives up after 20.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }.items():
        os.environ.setdefault(name, value)


def _profile_names_server() -> bool:
    path = PROFILES.expanduser()
    return path.exists() and "PREFECT_API_URL" in path.read_text()

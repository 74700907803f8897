"""The environment that Prefect and DVC get from `moeforge`: quiet, no telemetry, and a Prefect server that answers.

Where Prefect keeps its state and where its server is stand in prefect.toml, which the `prefect` commands read too.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE = 20.0
"""Seconds in which a Prefect server must answer."""


class ServerError(RuntimeError):
    """No Prefect server to run with; the message names its address and the fix."""


def prepare() -> None:
    """Set what the user has not set; call it before anything imports Prefect."""
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        # Python's resource tracker removes what a killed worker left behind, and would warn of it.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        # The display shows what the stages print, and an error is printed once, by the command line.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        # Under load a first start, which also creates the database, has taken 27 s; Prefect gives up after 20.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }.items():
        os.environ.setdefault(name, value)


def variables() -> dict[str, str]:
    """The environment of DVC and of stages: `python` is the one that runs this, and output is not buffered."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", "TQDM_DISABLE": "1"}


def connect() -> None:
    """See to a Prefect server for the flows that this process runs and for its children.

    A server that the settings name is used if it answers. One on this machine that does not run, and that only a file
    names, is replaced by a temporary one, which ends with this process and keeps its state in the same place.

    Raises:
        ServerError: PREFECT_API_URL, or an address elsewhere, does not answer; or the temporary one does not start.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url:
        problem = fault(url)
        if problem is None:
            return
        if is_needed(url):
            raise ServerError(f"Prefect's server at {url} {problem}; {how_to_fix()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    refresh_global_settings_context()
    home = get_current_settings().home.resolve()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):  # a server that cannot write would be waited for until it is late
            pass
        from prefect.server.api.server import SubprocessASGIServer  # takes three seconds: only where it is needed

        SubprocessASGIServer(port).start()
    except (RuntimeError, OSError) as error:
        raise ServerError(
            f"the temporary Prefect server did not start: {error}. It keeps its state in {home}: let this user write "
            "there, or name a running server by PREFECT_API_URL"
        ) from None


def fault(url: str) -> str | None:
    """What is wrong with the Prefect API at `url`, asked for PATIENCE seconds; None if nothing is."""
    answers: list[str | None] = []
    # A thread, because neither the look-up of a name nor a server that sends byte by byte keeps a socket's timeout.
    asking = threading.Thread(target=lambda: answers.append(_ask(f"{url.rstrip('/')}/health")), daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answers[0] if answers else f"does not answer within {PATIENCE:.0f} s"


def _ask(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=2 * PATIENCE) as answer:
            well = answer.read(16).strip() == b"true"
            return None if well else "answers, but is no Prefect API (does its address end in /api?)"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it wants the key that Prefect's own client has
            return None
        return f"answers {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return f"cannot be reached ({getattr(reason, 'strerror', None) or reason})"


def how_to_fix() -> str:
    """What a user can do if the server does not answer."""
    if os.environ.get("PREFECT_API_URL"):
        return "start it (prefect server start), correct PREFECT_API_URL, or unset it to run with a temporary server"
    return "start it, or correct `url` in prefect.toml"


def is_needed(url: str) -> bool:
    """Whether no temporary server may stand in for this one."""
    return bool(os.environ.get("PREFECT_API_URL")) or not is_here(url)


def is_here(url: str) -> bool:
    """Whether an address is this machine's own, which no other can reach."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")

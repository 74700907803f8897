"""What a user can fix is said in one message: a Prefect server that is not well, folders that cannot be written."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer

from flows import environment, terminal
from tasks.settings import SettingsError
from tests.flows.conftest import moeforge


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """The address of a server whose answer to each connection is up to `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                    connection.recv(4096)
                    answer(connection)
                    connection.close()
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"


def say(status: str, body: str) -> Callable[[socket.socket], object]:
    return lambda connection: connection.sendall(
        f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )


def drip(connection: socket.socket) -> None:
    for letter in "HTTP/1.1 200 OK\r\nX-Slow: " + "x" * 1000:
        connection.sendall(letter.encode())
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (say("200 OK", "true"), None),
        (say("401 Unauthorized", ""), None),
        (say("500 Internal Server Error", "oops"), "answers 500 Internal Server Error"),
        (say("503 Service Unavailable", "database is locked"), "answers 503 Service Unavailable"),
        (say("200 OK", "<html>"), "answers, but is no Prefect API"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), "cannot be reached"),
        (lambda connection: time.sleep(3), "does not answer within"),
        (drip, "does not answer within"),
    ],
)
def test_a_server_that_is_not_well_is_found_out_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch, *, answer: Callable[[socket.socket], object], problem: str | None
) -> None:
    monkeypatch.setattr(environment, "PATIENCE", 1.0)
    with answering(answer) as url:
        started = time.monotonic()
        fault = environment.fault(url)
    assert time.monotonic() - started < 2
    assert fault is None if problem is None else problem in str(fault)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "http://no.such.host.invalid/api", "127.0.0.1:4200", ""])
def test_an_address_that_leads_nowhere_cannot_be_reached(url: str) -> None:
    assert str(environment.fault(url)).startswith("cannot be reached (")


def test_a_run_with_a_dead_server_ends_in_one_line_that_names_it(done_toy: Path) -> None:
    result = moeforge("run", "toy", "--force", "report", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "moeforge: Prefect's server at http://127.0.0.1:9/api cannot be reached (Connection refused); start it "
        "(prefect server start), correct PREFECT_API_URL, or unset it to run with a temporary server"
    )


@pytest.mark.parametrize(
    ("folder", "command", "named"),
    [
        (".scratch", ["run", "toy"], ".scratch/run-toy: Permission denied; let this user"),
        (".dvc/tmp", ["status"], "/.dvc/tmp/"),
        (
            ".prefect",
            ["run", "toy", "--force", "report"],
            "the temporary Prefect server did not start: [Errno 13]",
        ),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_in_one_line(
    done_toy: Path, *, folder: str, command: list[str], named: str
) -> None:
    path = done_toy / folder
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    path.chmod(0o555)
    result = moeforge(*command, PREFECT_HOME=str(done_toy / ".prefect"))
    path.chmod(0o755)
    assert result.returncode == 1
    assert named in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SettingsError("pipelines.yaml: wrong"), "pipelines.yaml: wrong"),
        (
            PermissionError(13, "Permission denied", "runs/x"),
            "runs/x: Permission denied; let this user read and write",
        ),
        (OSError(30, "Read-only file system", "data"), "data: Read-only file system; let this user"),
        (OSError(28, "No space left on device", "data/x"), "data/x: No space left on device; make room"),
        (FileNotFoundError("runs/x: not there; run it first"), "runs/x: not there; run it first"),
        (KeyError("weight"), "KeyError: 'weight' (unexpected; the traceback is in .scratch/traceback.txt)"),
    ],
)
def test_each_error_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, error: Exception, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = terminal.message(error)
    assert said.startswith(message)
    assert "\n" not in said
    if isinstance(error, KeyError):
        assert "KeyError: 'weight'" in terminal.TRACE.read_text()


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (terminal.Terminated, 143)])
def test_a_command_that_is_stopped_says_how_to_go_on(
    stop: type[BaseException], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, terminal.clear_errors():
        raise stop
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == "moeforge: stopped. Finished stages are kept; run again to go on\n"

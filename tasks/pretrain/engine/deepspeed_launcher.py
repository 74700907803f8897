"""The command line of DeepSpeed's launcher. Nothing heavy is imported: the stage needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path

CHATTER = (b"[launch.py:", b"[runner.py:", b"[real_accelerator.py:")
"""Signs of what the launcher itself prints on stderr."""


def command(hostfile: Path, *, port: int, local: bool) -> list[str]:
    """The command that starts a module on the machines of a hostfile; the module and its arguments follow.

    Args:
        port: of the first machine, on which the processes meet.
        local: the hostfile has this machine alone, which needs no ssh.
    """
    where = ["--hostfile", str(hostfile), "--master_port", str(port)]
    if local:
        where += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        where += ["--force_multi"]  # else a single machine of the file would be taken for this one
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    return [*runner, *where, "--no_local_rank", "--module"]

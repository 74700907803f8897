"""A stand-in for Slurm's srun on one machine: N tasks with Slurm's variables, standard input for all of them.

As srun does with --kill-on-bad-exit=1, it ends all tasks when one fails, and exits with that one's status.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any


def main() -> int:
    count = next(int(word.split("=")[1]) for word in sys.argv if word.startswith("--ntasks="))
    program = list(itertools.dropwhile(lambda word: word.startswith("-"), sys.argv[1:]))
    step = {"SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "127.0.0.[1-2]", "SLURM_STEP_NUM_TASKS": str(count)}
    step |= {"SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_NODEID": "0"}
    tasks = []
    for rank in range(count):
        numbers = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        tasks.append(subprocess.Popen(program, env=os.environ | step | numbers, stdin=subprocess.PIPE))

    def forward_input() -> None:
        while os.read(0, 4096):
            pass
        for task in tasks:
            assert task.stdin is not None
            task.stdin.close()

    def end(*_: Any) -> None:
        for task in tasks:
            task.terminate()

    threading.Thread(target=forward_input, daemon=True).start()
    signal.signal(signal.SIGTERM, end)
    while True:
        codes = [task.poll() for task in tasks]
        if bad := [code for code in codes if code]:
            end()
            for task in tasks:
                task.wait()
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        if None not in codes:
            return 0
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())

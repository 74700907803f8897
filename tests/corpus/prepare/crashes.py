"""Kill the corpus stage again and again: each run is a forked child that dies at a chosen call, or is done.

python crashes.py KILLS SEED       # in the root of a project; prints what happened as JSON
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import code, scratch
from tasks.corpus import shards
from tasks.corpus.prepare import stage
from tests.corpus.texts import CORPUS

CALLS = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")
os.fsync = lambda file: None  # a killed process loses nothing that it wrote, and waiting for the disk takes long


def at_calls(tick: Callable[[], None]) -> None:
    """Have `tick` called before and after every call that changes names or waits for the disk, and inside shards."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            tick()
            result = real(*arguments, **more)
            tick()
            return result

        return call

    for name in CALLS:
        setattr(os, name, around(getattr(os, name)))
    write = shards.Hashed.write

    def torn(self: shards.Hashed, content: Any) -> int:
        view = memoryview(content).cast("B")
        half = len(view) // 2
        write(self, view[:half])
        self._file.flush()
        tick()
        return half + write(self, view[half:])

    shards.Hashed.write = torn  # type: ignore[method-assign]


def run_until(calls: int | None) -> int | None:
    """Run the stage in a child, killed at its `calls`-th tick; returns the ticks it had, None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.stderr = io.StringIO()
        at_calls(tick)
        try:
            stage.make("tiny", run=stage.processes(1))
            os.write(writer, str(count).encode())
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        ticks = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert ticks, "the stage failed"
    return int(ticks)


def result() -> str:
    """Names every byte that is published but the metrics, which hold times."""
    return scratch.digest(CORPUS) + scratch.digest(CORPUS.with_name("tiny.lengths.csv"))


def clear() -> None:
    """As if the stage had never run."""
    shutil.rmtree(CORPUS, ignore_errors=True)
    shutil.rmtree(".scratch/corpus-tiny", ignore_errors=True)


def main() -> None:
    """Kill it so often, at calls drawn from all scales, and see that every run that ends gives the same."""
    kills, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    code.fingerprint = functools.cache(code.fingerprint)
    stage.make("tiny", run=stage.processes(1))  # in this process, so that children find the tokenizer loaded
    clean = result()
    clear()
    total = run_until(None)
    assert total
    assert result() == clean
    clear()
    killed = ended = 0
    while killed < kills:
        if run_until(int(total ** rng.random())) is None:
            killed += 1
            continue
        ended += 1
        assert result() == clean
        clear()
    assert run_until(None)
    assert result() == clean
    left = [str(path) for path in Path(".scratch/corpus-tiny").iterdir()]
    print(json.dumps({"killed": killed, "ended": ended, "calls": total, "left": left}))


if __name__ == "__main__":
    main()

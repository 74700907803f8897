"""One live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """Shows step, loss, learning rate, tokens/s and the time left."""

    def __init__(self, steps: int, *, tokens_per_step: int, every: float = 10.0) -> None:
        """`every`: seconds between plain lines; the first and the last step always print."""
        self._steps, self._tokens, self._every = steps, tokens_per_step, every
        self._live = sys.stdout.isatty()
        self._begun = self._shown = time.perf_counter()
        self._done = 0

    def step(self, step: int, *, loss: float, lr: float, seconds: float) -> None:
        """Show a finished step that took `seconds`."""
        self._done += 1
        now = time.perf_counter()
        left = (now - self._begun) / self._done * (self._steps - step)
        text = (
            f"step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}  "
            f"{self._tokens / seconds:.0f} tokens/s  {_clock(left)} left"
        )
        if self._live:
            bar = "█" * (20 * step // self._steps)
            print(f"\r\033[K{bar:░<20} {text}"[: shutil.get_terminal_size().columns + 3], end="", flush=True)
        elif self._done == 1 or step == self._steps or now - self._shown >= self._every:
            self._shown = now
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        print(f"\r\033[K{text}" if self._live else text, flush=True)

    def close(self) -> None:
        """Leave the cursor on a line of its own."""
        if self._live:
            print(flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

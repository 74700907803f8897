"""A terminal that keeps what was written to it, and what it would show."""

from __future__ import annotations

import io
import re
from typing import Self

import pytest


class Terminal(io.StringIO):
    """A stream that says that it is a terminal of 40 rows and 100 columns."""

    @classmethod
    def open(cls, monkeypatch: pytest.MonkeyPatch, *, columns: int = 100) -> Self:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (("TERM", "xterm-256color"), ("COLUMNS", str(columns)), ("LINES", "40")):
            monkeypatch.setenv(name, value)
        return cls()

    def isatty(self) -> bool:
        return True

    def screen(self, *, columns: int = 100) -> list[str]:
        return screen(self.getvalue(), columns=columns)


def screen(written: str, *, rows: int = 40, columns: int = 100) -> list[str]:
    """What a terminal shows in the end: the few sequences that are used here, by hand."""
    lines, row, column = [[" "] * columns for _ in range(rows)], 0, 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", written):
        if token == "\n":
            row, column = row + 1, 0
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b["):
            count = int(token[2:-1] or 1) if token[2:-1].isdigit() or token[2:-1] == "" else 0
            if token[-1] == "A":
                row -= count
            elif token[-1] == "K":
                lines[row] = [" "] * columns
            elif token[-1] not in "mhl":
                raise AssertionError(f"{token!r} is not known to this terminal")
        else:
            lines[row][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines[: row + 1]]

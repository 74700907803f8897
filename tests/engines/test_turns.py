"""Models that take turns: what each is given to read, in which order, and what the rates come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from tasks.engines import turns


class Clock:
    """In the place of time.perf_counter: stands still but for what models add."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclasses.dataclass
class Model:
    """Takes a second for `speed` tokens, and notes what it reads."""

    name: str
    speed: float
    clock: Clock
    log: list[tuple[str, list[int]]]

    def restart(self) -> None:
        self.log.append((self.name, []))

    def read(self, ids: Sequence[int]) -> int:
        self.log[-1][1].extend(ids)
        self.clock.now += len(ids) / self.speed
        return 0


def test_models_take_turns_on_the_same_text_and_are_rated_by_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), list[tuple[str, list[int]]]()
    monkeypatch.setattr(turns, "time", clock)
    models = {name: Model(name, speed, clock, log) for name, speed in {"a": 10.0, "b": 20.0}.items()}
    ids = list(range(100))
    begun: list[str] = []
    rates = turns.take(models, turns.Text(ids, prompt=40, new=4, repeats=2), begins=begun.append)

    for name, speed in {"a": 10.0, "b": 20.0}.items():
        assert rates[name]["prompt"] == pytest.approx([speed] * 2)
        assert rates[name]["decode"] == pytest.approx([speed] * 2)
    assert begun == ["a", "b"] * 3
    one_turn = [("a", ids[:40]), ("a", ids[:20]), ("b", ids[:40]), ("b", ids[:20])]
    assert log[4:] == one_turn * 2


def test_a_short_text_is_read_as_far_as_it_goes_and_too_short_a_one_is_refused() -> None:
    text = turns.Text(list(range(30)))
    assert (text.prompt, text.new, text.length) == (30, 14, 30)
    with pytest.raises(ValueError, match="16 tokens is too short"):
        turns.Text([1] * 16)

"""Peak memory of a process that loads one model."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tasks.engines import gguf, memory, turns


def test_a_copy_of_this_process_has_the_peak_of_what_it_allocates_and_leaves_none_of_it_here() -> None:
    def allocate() -> dict[str, int]:
        with mmap.mmap(-1, 256 << 20) as pages:  # not of malloc, which may keep what is freed
            for _ in range(256):
                pages.write(bytes(1 << 20))
        grown = memory.peak()
        memory.forget_peak()
        return {"grown": grown, "later": memory.peak()}

    before = memory.peak()
    found = memory.in_fork(allocate)
    assert found["grown"] > 256 << 20
    assert found["later"] < found["grown"] - (128 << 20)
    assert memory.peak() - before < 64 << 20


def test_a_measurement_that_fails_gives_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> dict[str, int]:
        raise MemoryError

    assert memory.in_fork(fail) == {}
    assert "MemoryError" in capfd.readouterr().err


def test_llama_cpp_reports_more_than_the_file_and_nothing_of_one_that_it_refuses(
    tmp_path: Path, tiny_model: Path
) -> None:
    text = turns.Text(list(range(1, 65)), prompt=32)
    gguf.export(tiny_model, tmp_path / "tiny.gguf", kind="Q8_0")
    peak = memory.of_file(tmp_path / "tiny.gguf", text, threads=1)
    assert peak is not None
    assert peak > (tmp_path / "tiny.gguf").stat().st_size
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:2000])
    assert memory.of_file(tmp_path / "cut.gguf", text, threads=1) is None

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.pretrain.launch import out_of_memory
from tasks.settings import Pretrain
from tests import warm_processes


def params(**fields: Any) -> Pretrain:
    given = {"tokens": 1 << 16, "seq_len": 64, "batch": 8, "micro_batch": 4, "learning_rate": 1e-3, "zero_stage": 1}
    return Pretrain(**{**given, **fields})


def allocate_too_much() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for ask in (
        lambda: torch.zeros(1 << 28), lambda: bytearray(1 << 30), lambda: np.ones(1 << 30, np.uint8),
        lambda: torch.zeros(1 << 22).expand(128, 1 << 22).contiguous(),
    ):  # fmt: skip
        try:
            ask()
        except Exception as error:
            print(type(error).__name__, out_of_memory.explain(error, params(zero_stage=0)))


def test_a_real_allocation_that_fails_under_a_limit_is_explained_whichever_library_asked_for_it() -> None:
    done = warm_processes.run(allocate_too_much)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "RuntimeError",
        "MemoryError",
        "MemoryError",
        "RuntimeError",
    ], done.stderr
    for line in lines:
        assert "the machine's memory ran out in training" in line
        assert "Set pretrain.micro_batch: 2 (now 4); or gradient_checkpointing: true (now false)." in line
        assert line.endswith("The last checkpoint is kept; run again to go on")


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "the accelerator's memory",
        ),
        (RuntimeError("CUDA error: out of memory"), "the accelerator's memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the accelerator's",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: y"
            ),
            "the machine's memory",
        ),
        (MemoryError(), "the machine's memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine's memory"),
    ],
)
def test_every_kind_of_memory_error_is_known(error: BaseException, whose: str) -> None:
    message = out_of_memory.explain(error, params())
    assert message is not None
    assert message.startswith(whose)
    around = RuntimeError("a hook failed")
    around.__cause__ = error
    assert out_of_memory.explain(around, params()) == message


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(errno.ENOSPC, "No space left")]
)
def test_other_errors_are_not_explained(error: Exception) -> None:
    assert out_of_memory.explain(error, params()) is None


LAST = {"micro_batch": 1, "gradient_checkpointing": True}
CHECKPOINTING = "gradient_checkpointing: true (now false)"


@pytest.mark.parametrize(
    ("fields", "device", "expected"),
    [
        ({}, False, ["pretrain.micro_batch: 2 (now 4)", CHECKPOINTING]),
        ({"micro_batch": 3, "batch": 12}, False, ["pretrain.micro_batch: 2 (now 3)", CHECKPOINTING]),
        ({"micro_batch": 3, "batch": 9}, False, ["pretrain.micro_batch: 1 (now 3)", CHECKPOINTING]),
        (LAST, False, []),
        (
            {**LAST, "processes": 4, "zero_stage": 2},
            False,
            ["zero_stage: 3 (now 2)", "processes: 2 (now 4), which share this machine's memory"],
        ),
        ({**LAST, "processes": 4, "zero_stage": 3, "launcher": "slurm"}, False, []),
        ({**LAST, "processes": 2, "zero_stage": 3, "expert_parallel": 2}, False, []),
        (LAST, True, ["offload: true (now false)", "processes: 2 (now 1), each with an accelerator"]),
        ({**LAST, "zero_stage": 0}, True, ["offload: true (now false), with zero_stage: 1"]),
        ({**LAST, "processes": 8, "offload": True, "zero_stage": 3}, True, []),
        ({**LAST, "distill": {}}, False, ["distill.top_n: 64 (now absent, and the parent in memory)"]),
        ({**LAST, "distill": {"logits": 0.0, "hidden": 1.0}}, False, []),
    ],
)
def test_only_settings_that_still_help_are_named_in_order_and_they_are_valid(
    fields: dict[str, Any], device: bool, expected: list[str]
) -> None:
    now = params(**fields)
    result = out_of_memory.settings(now, device=device)
    assert result == expected
    for line in result:  # the settings accept each
        field, value = line.removeprefix("pretrain.").split(" (now")[0].split(": ")
        if "." not in field:
            params(**{**fields, field: True if value == "true" else int(value)})


def test_a_run_without_a_setting_left_is_told_to_shorten_its_windows() -> None:
    last = params(micro_batch=1, gradient_checkpointing=True)
    assert "No setting is left that needs less: shorten pretrain.seq_len" in str(
        out_of_memory.explain(MemoryError(), last)
    )


def test_a_process_killed_by_signal_9_is_told_what_needs_less_of_the_machines_memory() -> None:
    message = out_of_memory.killed(params())
    assert message.startswith(
        "a training process was killed by signal 9: by hand, or because the machine's memory ran out"
    )
    assert "Set pretrain.micro_batch: 2 (now 4)" in message

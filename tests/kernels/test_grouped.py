import json
from typing import Any

import pytest
import torch
from children import run_python

pytest.importorskip("triton")
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448}


def test_the_triton_forward_agrees_with_fp64() -> None:
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_cases.py", **environment)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_python("compile_ahead_of_time.py").splitlines()]


def test_every_shipped_tile_compiles_for_ampere_and_hopper(compiled: list[dict[str, Any]]) -> None:
    assert {line["capability"] for line in compiled} == {80, 90}
    assert {line["kernel"] for line in compiled} == {"up_kernel", "down_kernel", "combine_kernel"}


def test_no_kernel_spills_registers_or_asks_for_more_shared_memory_than_the_card_has(
    compiled: list[dict[str, Any]],
) -> None:
    for line in compiled:
        assert line["spilled"] == 0, line
        assert line["shared"] <= SHARED_MEMORY_LIMIT[line["capability"]], line


def test_half_precision_gemms_use_the_tensor_cores_and_asynchronous_copies(compiled: list[dict[str, Any]]) -> None:
    gemms = [line for line in compiled if line["itemsize"] == 2 and line["kernel"] != "combine_kernel"]
    for line in gemms:
        wide_hopper = line["capability"] == 90 and line["block_rows"] >= 64
        assert line["wgmma" if wide_hopper else "mma"] > 0, line
        assert line["async_copies"] > 0, line

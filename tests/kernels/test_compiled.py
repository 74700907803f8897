"""Every kernel compiled at real shapes, on architectures that need not be here."""

import json
from typing import Any

import pytest
from children import run_python

pytest.importorskip("triton")
Line = dict[str, Any]
GEMMS = {"up", "down", "down_backward", "x_gradient", "w13_gradient", "w2_gradient"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    cache = str(tmp_path_factory.mktemp("triton"))
    printed = run_python("compile_ahead_of_time.py", TRITON_CACHE_DIR=cache, OMP_NUM_THREADS="1")
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def compiled(lines: list[Line]) -> list[Line]:
    return [line for line in lines if "error" not in line]


@pytest.fixture(scope="module")
def gemms(compiled: list[Line]) -> list[Line]:
    """The matrix products at widths that are multiples of 16: others have rows without 16-byte alignment."""
    return [line for line in compiled if line["table"] in GEMMS and not line["case"].endswith("F=24")]


def test_every_launch_of_the_layer_compiles_for_ampere_hopper_and_blackwell(lines: list[Line]) -> None:
    assert [line for line in lines if "error" in line] == []
    for arch in (80, 90, 100):
        assert {line["table"] for line in lines if line["arch"] == arch} >= GEMMS
    assert {line["dtype"] for line in lines} == {"bf16", "fp16", "fp32"}


def test_every_tile_of_the_shipped_table_is_compiled_for_hopper(compiled: list[Line]) -> None:
    from moe_kernels.config import PATH

    for row in json.loads(PATH.read_text())["rows"]:
        if row["arch"] == 90:
            assert row["tile"] in [line["tile"] for line in compiled if line["table"] == row["kernel"]], row


def test_no_kernel_spills_registers(compiled: list[Line]) -> None:
    assert [line for line in compiled if line["spilled"]] == []
    assert [line for line in compiled if line["registers"] > 255] == []


def test_no_kernel_asks_for_more_shared_memory_than_the_card_has(compiled: list[Line]) -> None:
    from bench.tune.predict import MEMORY

    assert [line for line in compiled if line["shared"] > MEMORY[line["arch"]]] == []


def test_half_precision_products_run_on_the_tensor_cores_of_each_architecture(gemms: list[Line]) -> None:
    half = [line for line in gemms if line["dtype"] != "fp32"]
    for line in half:
        if line["arch"] == 80 or line["tile"]["block_m"] < 64:
            assert line["mma"] + line["wgmma"] + line["tcgen05"] > 0, line
        else:
            assert line["wgmma" if line["arch"] == 90 else "tcgen05"] > 0, line
    assert any(line["wgmma"] for line in half)
    assert any(line["tcgen05"] for line in half)


def test_operands_of_every_product_are_copied_asynchronously(gemms: list[Line]) -> None:
    assert [line for line in gemms if line["async_copies"] + line["bulk_copies"] == 0] == []


def test_rows_are_combined_by_vector_loads(compiled: list[Line]) -> None:
    combines = [line for line in compiled if line["kernel"] == "combine_kernel"]
    assert len(combines) >= 3
    assert [line for line in combines if line["vector_loads"] == 0] == []


def test_no_result_can_depend_on_the_order_of_atomics_or_pays_for_double_precision(compiled: list[Line]) -> None:
    assert [line for line in compiled if line["atomics"]] == []
    assert [line for line in compiled if line["double"]] == []

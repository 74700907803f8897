from __future__ import annotations

from pathlib import Path

import pytest

from tasks.moe import device


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(tmp_path: Path, flags: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{flags}\n")
    assert device.cpu_has_bfloat16(cpuinfo) is expected
    assert not device.cpu_has_bfloat16(tmp_path / "absent")

"""The floors against the published table that they were checked with (H100, bf16)."""

import pytest

from bench.kernels.roofline import CARDS, full_flops, pass_floor, saved_bytes, work
from bench.kernels.shapes import Shape

H100 = CARDS["NVIDIA H100 80GB HBM3"]


QWEN3 = Shape(8192, 128, 8, 2048, 768)

# T, E, K, D, F; GFLOP of the forward, its FLOP a byte; ms of forward, backward, both
TABLE = [
    ((8192, 16, 4, 4096, 688), (554, 494), (0.560, 1.120, 1.680)),
    ((8192, 16, 2, 4096, 688), (277, 363), (0.280, 0.560, 0.840)),
    ((8192, 8, 2, 4096, 1376), (554, 649), (0.560, 1.120, 1.680)),
    ((32768, 16, 4, 4096, 688), (2216, 603), (2.240, 4.480, 6.720)),
    ((8192, 64, 8, 2048, 1024), (825, 424), (0.833, 1.667, 2.500)),
    ((8192, 8, 2, 4096, 14336), (5772, 1132), (5.834, 11.669, 17.503)),
    ((8192, 128, 8, 2048, 768), (618, 279), (0.661, 1.250, 1.911)),
    ((32768, 128, 8, 2048, 768), (2474, 473), (2.500, 5.001, 7.501)),
    ((8192, 40, 8, 1536, 512), (309, 340), (0.313, 0.625, 0.938)),
    ((24576, 128, 8, 1536, 256), (464, 225), (0.616, 0.938, 1.554)),
    ((32768, 256, 16, 4096, 256), (3299, 279), (3.526, 6.668, 10.193)),
    ((8192, 32, 4, 2880, 2880), (1631, 578), (1.648, 3.296, 4.945)),
    ((8192, 64, 6, 2048, 1408), (850, 399), (0.860, 1.719, 2.579)),
]


@pytest.mark.parametrize(("sizes", "gemms", "ms"), TABLE, ids=str)
def test_the_floors_of_the_published_table_are_reproduced_to_three_digits(
    sizes: tuple[int, ...], gemms: tuple[int, int], ms: tuple[float, ...]
) -> None:
    floors = pass_floor(Shape(*sizes), H100)
    assert [floors[name] for name in ("forward", "backward", "full")] == pytest.approx(ms, abs=6e-4)
    forward = [item for item in work(Shape(*sizes)) if item.of == "forward"]
    flops, bytes_ = sum(item.flops for item in forward), sum(item.bytes for item in forward)
    assert (round(flops / 1e9), round(flops / bytes_)) == gemms
    assert full_flops(Shape(*sizes)) == 3 * flops


def test_the_published_fractions_of_the_best_triton_kernel_follow_from_its_times() -> None:
    full_ms = {128: 1.275, 1024: 1.663, 8192: 5.417, 32768: 19.005}
    fractions = [pass_floor(Shape(t, 128, 8, 2048, 768), H100)["full"] / ms for t, ms in full_ms.items()]
    assert [round(fraction, 2) for fraction in fractions] == [0.86, 0.71, 0.35, 0.39]


def test_the_work_of_each_kernel_is_that_of_the_published_gap_table() -> None:
    # GFLOP and MB of each kernel; both combines are one row there.
    published = {
        "up": (412, 1141),
        "down": (206, 772),
        "down_backward": (206, 940),
        "x_gradient": (412, 1275),
        "w13_gradient": (412, 1040),
        "w2_gradient": (206, 537),
    }
    items = {item.kernel: item for item in work(QWEN3)}
    for kernel, figures in published.items():
        assert (round(items[kernel].flops / 1e9), round(items[kernel].bytes / 1e6)) == figures
    assert round((items["combine"].bytes + items["combine_backward"].bytes) / 1e6) == 604


def test_the_kernels_of_a_pass_move_the_bytes_of_the_closed_formula() -> None:
    t, e, d, n, m = 8192, 128, 2048, 768, 65536
    bytes_ = {name: sum(item.bytes for item in work(QWEN3) if item.of == name) for name in ("forward", "backward")}
    assert bytes_["forward"] == 2 * (2 * t * d + 3 * e * d * n + 4 * m * n + 2 * m * d)
    assert bytes_["backward"] == 2 * (4 * t * d + 6 * e * d * n + 10 * m * n + 2 * m * d)
    inference = sum(item.bytes for item in work(QWEN3, keep_hidden=False) if item.of == "forward")
    assert bytes_["forward"] - inference == 2 * 2 * m * n


def test_saved_bytes_are_x_hidden_and_twelve_bytes_a_row() -> None:
    assert saved_bytes(Shape(8192, 16, 4, 4096, 688)) == pytest.approx(157e6 + 12 * 32768, abs=0.5e6)
    assert saved_bytes(QWEN3) == pytest.approx(235e6 + 12 * 65536, abs=0.5e6)

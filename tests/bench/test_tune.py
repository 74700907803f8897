import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from moe_kernels import config  # noqa: E402
from moe_kernels.config import Kernel, Row, Tile  # noqa: E402

from bench.kernels.shapes import Shape  # noqa: E402
from bench.tune import __main__ as tune  # noqa: E402
from bench.tune.predict import seconds  # noqa: E402
from bench.tune.trial import Layer, Trial, measured  # noqa: E402

SMALL, LARGE = Shape(64, 4, 2, 64, 32), Shape(8192, 16, 4, 4096, 688)
TILE = Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, group_m=8)
OTHER = replace(TILE, block_n=128)


def times(milliseconds: dict[Tile, float | str]) -> Callable[[Kernel, Tile], Trial]:
    """A measure that answers from a table; a word is a refusal."""

    def measure(kernel: Kernel, tile: Tile) -> Trial:
        answer = milliseconds[tile]
        return Trial(None, answer) if isinstance(answer, str) else Trial(answer, "")

    return measure


def test_the_fastest_tile_wins_and_refused_ones_do_not_count() -> None:
    third = replace(TILE, block_m=16)
    measure = times({TILE: 2.0, OTHER: 1.0, third: "spills"})
    assert tune.fastest("up", [TILE, OTHER, third], measure=measure, known=[]) == (OTHER, 1.0)
    assert tune.fastest("up", [third], measure=measure, known=[]) is None


def test_in_a_tie_the_tile_that_the_table_has_already_wins() -> None:
    measure = times({TILE: 1.01, OTHER: 1.0})
    assert tune.fastest("up", [TILE, OTHER], measure=measure, known=[TILE]) == (TILE, 1.01)
    assert tune.fastest("up", [TILE, OTHER], measure=times({TILE: 1.1, OTHER: 1.0}), known=[TILE]) == (OTHER, 1.0)


def test_a_tile_that_exhausts_the_memory_is_named_and_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(kernel: Kernel, tile: Tile) -> Trial:
        if tile == TILE:
            raise torch.OutOfMemoryError("out of memory")
        return Trial(1.0, "")

    assert tune.fastest("up", [TILE, OTHER], measure=measure, known=[]) == (OTHER, 1.0)
    assert re.search("64x64x64 .* refused .*out of memory", capsys.readouterr().out)


def fill(rows: Sequence[Row], **changes: Any) -> tuple[Row, ...]:
    def measure_at(shape: Shape) -> Callable[[Kernel, Tile], Trial]:
        return lambda kernel, tile: Trial(float(tile.block_m), "")

    arguments: dict[str, Any] = {
        "shapes": [SMALL, LARGE],
        "kernels": ["up", "w2_gradient"],
        "arch": 90,
        "itemsize": 2,
        "card": "a card",
        "most": 3,
        "again": False,
        "measure_at": measure_at,
        "store": lambda rows: None,
    }
    return tune.fill(rows, **arguments | changes)


def test_every_kernel_at_every_shape_gets_a_row_that_says_who_measured_it() -> None:
    rows = fill(())
    assert {(row.kernel, row.rows_per_expert, row.columns, row.depth) for row in rows} == {
        ("up", 32, 32, 64),
        ("w2_gradient", 32, 32, 32),
        ("up", 2048, 688, 4096),
        ("w2_gradient", 2048, 688, 2048),
    }
    assert all(row.measured is not None and "a card" in row.measured for row in rows)


def test_on_a_device_the_order_of_programs_of_the_fastest_tile_is_measured_too() -> None:
    def measure_at(shape: Shape) -> Callable[[Kernel, Tile], Trial]:
        return lambda kernel, tile: Trial(tile.block_m / tile.group_m, "")

    assert {row.tile.group_m for row in fill((), measure_at=measure_at)} == {16}
    assert {row.tile.group_m for row in fill((), measure_at=measure_at, card=None)} == {8}


def test_a_killed_run_goes_on_where_it_stopped() -> None:
    stored: list[Sequence[Row]] = []
    measured_shapes: list[Shape] = []

    def killed(shape: Shape) -> Callable[[Kernel, Tile], Trial]:
        if shape == LARGE:
            raise KeyboardInterrupt
        return lambda kernel, tile: Trial(1.0, "")

    def resumed(shape: Shape) -> Callable[[Kernel, Tile], Trial]:
        measured_shapes.append(shape)
        return lambda kernel, tile: Trial(1.0, "")

    with pytest.raises(KeyboardInterrupt):
        fill((), kernels=["up"], measure_at=killed, store=stored.append)
    rows = fill(stored[-1], kernels=["up"], measure_at=resumed)
    assert measured_shapes == [LARGE]
    assert len(rows) == 2
    fill(rows, kernels=["up"], measure_at=resumed, again=True)
    assert measured_shapes == [LARGE, SMALL, LARGE]


def test_a_prediction_never_replaces_a_measurement_but_another_prediction() -> None:
    key = tune.key_of("up", SMALL, arch=90, itemsize=2)
    predicted = Row(**key._asdict(), tile=TILE)
    known = replace(predicted, measured="1 ms, a card")
    assert tune.place([known], replace(predicted, tile=OTHER)) == (known,)
    assert tune.place([predicted], replace(predicted, tile=OTHER)) == (replace(predicted, tile=OTHER),)
    assert tune.place([predicted], known) == (known,)


def test_dropping_redundant_rows_changes_no_answer_and_no_measurement() -> None:
    keys = [tune.key_of("up", Shape(tokens, 4, 2, 64, 32), arch=90, itemsize=2) for tokens in (8, 64, 512, 4096)]
    tiles = [OTHER, TILE, TILE, TILE]
    rows = [Row(**key._asdict(), tile=tile) for key, tile in zip(keys, tiles, strict=True)]
    rows.append(replace(rows[-1], depth=128, measured="1 ms, a card"))
    kept = tune.without_redundant(rows)
    assert len(kept) < len(rows)
    assert rows[-1] in kept
    assert [config.nearest(kept, row.key) for row in rows] == [row.tile for row in rows]


def fake_launch(layer: Layer, *, error: float, spilled: int = 0) -> Callable[..., Any]:
    """What ``Layer.launch`` returns, with the right results but for a relative ``error``."""
    refusal = "spilled" if spilled else None
    launch = SimpleNamespace(resources=SimpleNamespace(refusal=lambda arch: refusal))

    def result(self: Layer, kernel: Kernel, tile: Tile, *, run: bool) -> tuple[Any, list[torch.Tensor]]:
        return launch, [tensor * (1 + error) for tensor in layer.torch()]

    return result


def small_layer() -> Layer:
    layer = Layer.make(SMALL, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (layer.x_TD, layer.w13_EGD, layer.w2_EDF, layer.grad_out_TD):
        tensor.normal_(generator=generator)
    return layer


@pytest.mark.parametrize(("error", "spilled"), [(1e-3, 0), (float("nan"), 0), (0.0, 48)])
def test_a_wrong_or_spilling_tile_is_never_timed(error: float, spilled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(launch: object) -> float:
        raise AssertionError("timed")

    layer = small_layer()
    monkeypatch.setattr(Layer, "launch", fake_launch(layer, error=error, spilled=spilled))
    trial = measured(layer, arch=90, timer=timer)("up", TILE)
    assert trial.milliseconds is None
    assert ("spilled" if spilled else "wrong") in trial.note


def test_a_right_tile_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer()
    monkeypatch.setattr(Layer, "launch", fake_launch(layer, error=1e-7))
    assert measured(layer, arch=90, timer=lambda launch: 0.25)("up", TILE).milliseconds == 0.25


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_candidates_fit_in_shared_memory_and_the_model_prefers_tall_tiles_for_many_rows(arch: int) -> None:
    few, many = (
        tune.promising("down", shape, itemsize=2, arch=arch, most=1)[0]
        for shape in (Shape(8, 16, 4, 4096, 688), LARGE)
    )
    assert few.block_m < many.block_m
    assert many.block_m * many.block_n >= 128 * 128


def test_the_predicted_time_is_one_to_four_times_that_of_the_products_alone() -> None:
    flops = 2 * 8192 * 4 * 4096 * 688
    for kernel, share in {"up": 2, "down": 1, "down_backward": 1, "x_gradient": 2, "w13_gradient": 2}.items():
        best = tune.promising(kernel, LARGE, itemsize=2, arch=90, most=1)[0]  # type: ignore[arg-type]
        time = seconds(kernel, best, LARGE, itemsize=2, arch=90)  # type: ignore[arg-type]
        assert share * flops / 989e12 < time < 4 * share * flops / 989e12, kernel


def test_without_a_device_the_command_says_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds none; --dry-run --arch 90 compiles and predicts"):
        tune.main([])


def test_a_shape_that_cannot_be_read_is_refused_with_the_way_to_write_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--shape", "8192,16"])
    assert "argument --shape: '8192,16': write T,E,K,D,F or NAME@T" in capsys.readouterr().err


def test_a_dry_run_compiles_lists_what_candidates_take_and_writes_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    table = tmp_path / "tiles.json"
    dry_run = ["--dry-run", "--arch", "90", "--kernel", "down", "--candidates", "2"]
    dry_run += ["--shape", "512,16,4,4096,688", "--table", str(table)]
    tune.main(dry_run)
    printed = capsys.readouterr().out
    assert len(re.findall(r"ms +predicted; \d+ registers, \d+ bytes shared", printed)) == 2
    assert "down arch=90 rows=128 columns=4096 depth=688: none -> " in printed
    assert not table.exists()
    tune.main([*dry_run, "--write"])
    (row,) = config.load(table)
    assert (row.kernel, row.rows_per_expert, row.columns, row.depth) == ("down", 128, 4096, 688)
    assert row.measured is None

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_kernels import config
from moe_kernels.config import KERNELS, Kernel, Key, Row, Tile

TILE = Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3, group_m=8)
ROW = Row(arch=90, kernel="up", itemsize=2, rows_per_expert=2048.0, columns=688, depth=4096, tile=TILE)
CARDS = (80, 86, 89, 90, 100, 103, 120)


def waste(columns: int, tile: Tile) -> float:
    padded = -(-columns // tile.block_n) * tile.block_n
    return padded / columns - 1


@given(
    kernel=st.sampled_from(KERNELS),
    rows=st.floats(0, 1e6),
    columns=st.integers(1, 200_000),
    depth=st.integers(0, 200_000),
    itemsize=st.sampled_from((2, 4)),
    arch=st.sampled_from((config.INTERPRETER, *CARDS)),
)
def test_every_kernel_has_a_tile_at_every_shape_on_every_card(
    kernel: Kernel, rows: float, columns: int, depth: int, itemsize: int, arch: int
) -> None:
    tile = config.tile(kernel, rows_per_expert=rows, columns=columns, depth=depth, itemsize=itemsize, arch=arch)
    assert tile.block_m * tile.block_n >= 256


def test_a_shape_of_the_table_gets_its_own_tile() -> None:
    for row in config.shipped_table():
        assert config.nearest(config.shipped_table(), row.key) == row.tile


def test_a_shape_between_two_rows_gets_the_nearer_ones_tile() -> None:
    few = replace(ROW, rows_per_expert=4, tile=replace(TILE, block_m=16))
    for rows, block in ((1, 16), (50, 16), (200, 128), (100_000, 128)):
        assert config.nearest([few, ROW], ROW.key._replace(rows_per_expert=rows)).block_m == block  # type: ignore[union-attr]


def test_a_wide_tile_is_not_given_to_a_width_that_it_would_mostly_pad() -> None:
    wide = replace(ROW, columns=768, tile=replace(TILE, block_n=256))
    far = replace(ROW, columns=512)
    assert config.nearest([wide, far], ROW.key._replace(columns=760)) == wide.tile
    assert config.nearest([wide, far], ROW.key._replace(columns=800)) == far.tile


def test_rows_of_other_kernels_cards_and_precisions_are_never_answered() -> None:
    for other in (replace(ROW, kernel="down"), replace(ROW, arch=80), replace(ROW, itemsize=4)):
        assert config.nearest([other], ROW.key) is None


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("width", [512, 688, 704, 768, 896, 1024, 1376, 1792, 14336])
def test_widths_of_real_experts_lose_little_to_padding(arch: int, width: int) -> None:
    for kernel in ("up", "down_backward"):
        tile = config.tile(kernel, rows_per_expert=2048, columns=width, depth=4096, itemsize=2, arch=arch)  # type: ignore[arg-type]
        assert waste(width, tile) <= 0.15, (kernel, tile)


@pytest.mark.parametrize("arch", CARDS)
def test_decoding_gets_short_tiles_and_training_tall_ones(arch: int) -> None:
    for kernel in ("up", "down"):
        one = config.tile(kernel, rows_per_expert=0.5, columns=688, depth=4096, itemsize=2, arch=arch)  # type: ignore[arg-type]
        many = config.tile(kernel, rows_per_expert=8192, columns=688, depth=4096, itemsize=2, arch=arch)  # type: ignore[arg-type]
        assert one.block_m <= 32
        assert many.block_m >= 64


@pytest.mark.parametrize(
    ("arch", "served_by"), [(75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)]
)
def test_a_card_is_served_by_the_tiles_of_its_family(arch: int, served_by: int) -> None:
    assert config.family(arch) == served_by


def test_a_forced_tile_is_answered_inside_its_block_only() -> None:
    def ask(kernel: Kernel) -> Tile:
        return config.tile(kernel, rows_per_expert=64, columns=64, depth=64, itemsize=2, arch=90)

    before, candidate = ask("up"), replace(TILE, num_stages=7)
    with config.forced("up", candidate):
        assert ask("up") == candidate
        assert ask("down") != candidate
    assert ask("up") == before


def test_a_table_survives_writing_and_does_not_depend_on_the_order_of_its_rows(tmp_path: Path) -> None:
    rows = (ROW, replace(ROW, kernel="down", measured="0.1 ms, a card"), replace(ROW, rows_per_expert=0.5))
    config.dump(rows, tmp_path / "a.json")
    config.dump(rows[::-1], tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert set(config.load(tmp_path / "a.json")) == set(rows)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "sideways"}, "row 0: kernel = 'sideways'; one of up, down"),
        ({"itemsize": 8}, "row 0: itemsize = 8; 2 for fp16 and bf16, 4 for fp32"),
        ({"arch": 86}, "row 0: arch = 86; 0 (interpreter), 80, 90 or 100"),
        ({"columns": -1}, "row 0: columns = -1; an integer that is not negative"),
        ({"rows_per_expert": 0}, "row 0: rows_per_expert = 0; a positive number"),
        ({"measured": 3}, "row 0: measured = 3; card and time, or null"),
        ({"tile": None}, "row 0: tile = None; a tile is an object"),
        ({"tile": asdict(TILE) | {"block_n": 48}}, "row 0: tile.block_n = 48; a power of two"),
        ({"tile": asdict(TILE) | {"block_k": 8}}, "row 0: tile.block_k = 8; at least 16"),
        ({"tile": asdict(TILE) | {"num_stages": 0}}, "row 0: tile.num_stages = 0; a positive integer"),
        ({"tile": {"block_m": 16}}, "row 0: fields = ['block_m']; they are ['block_k', 'block_m', 'block_n'"),
        ({"colour": "red"}, "row 0: fields"),
    ],
)
def test_a_broken_row_is_named_with_its_file_field_value_and_fix(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"rows": [asdict(ROW) | change]}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        config.load(path)


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"tiles": []}'):
        (tmp_path / "tiles.json").write_text(text)
        with pytest.raises(ValueError, match="not a tile table"):
            config.load(tmp_path / "tiles.json")


def test_the_key_of_a_row_is_what_the_host_code_asks_for() -> None:
    assert ROW.key == Key(90, "up", 2, 2048.0, 688, 4096)

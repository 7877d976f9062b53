"""The Hopper kernel of gate and up: equal to its twin, and its tiles whole; the kernel itself runs on a GPU alone."""

import pytest
import torch

from kernels.card import HOPPER_SHARED_BYTES
from kernels.elementwise import act_and_mul_torch
from kernels.gated_gemm import ROWS, TILE_COLUMNS, Tile, can_gated_gemm, choose_tile, gated_gemm, source

SIZES = [14336, 7168, 3072, 1536, 11008, 9728, 8960, 576, 64]
TILES = [Tile(columns, shares_weights) for columns in TILE_COLUMNS for shares_weights in (True, False)]


@pytest.mark.parametrize("n", SIZES)
def test_tiles_cover_all_columns(n: int) -> None:
    for num_row_tiles in range(1, 65):
        tile = choose_tile(num_row_tiles, n, 132)
        assert tile is not None
        num_columns = tile.columns * (1 if tile.shares_weights else 2)
        assert n % num_columns == 0
        assert tile.num_pairs(num_row_tiles, n) * 2 * tile.columns >= num_row_tiles * n


def test_the_tile_is_the_one_that_leaves_fewest_multiprocessors_idle() -> None:
    assert choose_tile(1, 14336, 132) == Tile(112, False)  # 128 of 132 busy, once
    assert choose_tile(2, 14336, 132) == Tile(112, True)
    assert choose_tile(16, 14336, 132) == Tile(128, True)


@pytest.mark.parametrize("tile", TILES)
def test_a_block_fits_into_a_multiprocessor(tile: Tile) -> None:
    assert tile.num_stages >= 3
    assert tile.shared_bytes <= HOPPER_SHARED_BYTES
    assert tile.columns % 16 == 0, "columns are written in pairs of groups of 8"


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_source_names_the_instruction_of_its_tile(dtype: torch.dtype, act: str) -> None:
    text = source(dtype, act, Tile(112, True))
    short = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert f'"m64n224k16.f32.{short}.{short}"' in text
    assert '"+f"(d[111])' in text and '"+f"(d[112])' not in text


def test_a_cpu_has_other_kernels() -> None:
    x, weight = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.bfloat16)
    assert not can_gated_gemm(x, weight, "silu")


def check(num_rows: int, n: int, k: int, dtype: torch.dtype, act: str, tile: Tile | None = None) -> None:
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, k, device="cuda", dtype=dtype)
    weight = torch.randn(2 * n, k, device="cuda", dtype=dtype) * k**-0.5
    assert can_gated_gemm(x, weight, act)
    expected = act_and_mul_torch((x.double() @ weight.double().t()).float(), act)
    found = gated_gemm(x, weight, act, tile)
    assert found.shape == expected.shape and found.dtype == dtype
    # Of each output by itself: a row or a tile left out would hide in a norm over all.
    tolerance = 2 * torch.finfo(dtype).eps * expected.abs().clamp(min=1.0)
    assert ((found.float() - expected).abs() <= tolerance).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 5, 64, 65, 129, 300, 528, 1100, 4200])
def test_the_kernel_equals_its_twin_for_any_number_of_rows(num_rows: int, dtype: torch.dtype) -> None:
    check(num_rows, 3072, 1024, dtype, "silu")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
def test_the_kernel_equals_its_twin_with_any_tile(tile: Tile) -> None:
    check(2 * ROWS + 70, 4 * tile.columns, 192, torch.bfloat16, "silu", tile)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (7168, 4096), (576, 64), (64, 576)])
def test_the_kernel_equals_its_twin_for_models_of_any_size(n: int, k: int) -> None:
    check(200, n, k, torch.bfloat16, "gelu_tanh")

"""A few tokens' products on Hopper: equal to their twins, their tiles whole; the kernel itself runs on a GPU alone."""

from typing import Any

import pytest
import torch

from kernels import few_gemm as few
from kernels import gated_gemm
from kernels.card import HOPPER_SHARED_BYTES
from kernels.elementwise import act_and_mul_torch
from kernels.few_gemm import (
    GRANULE,
    TILE_COLUMNS,
    TOKENS,
    FewConfig,
    can_few_gemm,
    few_config,
    few_gemm,
    shared_bytes,
    source,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMS = 132
SHAPES = [(6144, 4096), (4096, 14336), (14336, 4096), (128256, 4096), (18944, 3584), (1024, 64), (8, 128)]


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_block_fits_into_a_multiprocessor(n: int, k: int, tokens: int, is_gated: bool) -> None:
    config = few_config(n, k, tokens, is_gated, SMS)
    assert config.stages >= 2
    assert shared_bytes(tokens, config, is_gated) <= HOPPER_SHARED_BYTES
    assert config.columns % GRANULE == 0 and config.columns <= TILE_COLUMNS[is_gated]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_two_tiles_of_tokens_share_their_weights(n: int, k: int) -> None:
    config = few_config(n, k, TOKENS[-1], False, SMS, 2)
    assert config.stages >= 2 and shared_bytes(TOKENS[-1], config, False) <= HOPPER_SHARED_BYTES
    assert config.share == (2 if k > 64 else 1), "each copies half of a stage's slabs, if there are two"
    assert config.slabs % config.share == 0


def test_tiles_leave_the_fewest_multiprocessors_idle() -> None:
    assert few_config(6144, 4096, 16, False, SMS).columns == 48  # 128 of 132 busy, once
    assert few_config(4096, 14336, 16, False, SMS).columns == 32
    assert few_config(6144, 4096, 64, False, SMS, 2).columns == 96, "of two tiles of tokens each has half of them"
    assert few_config(14336, 4096, 16, True, SMS).columns == 112
    assert few_config(151936, 2048, 16, False, SMS).columns <= few.MANY_TILE_COLUMNS, "of a head each has many"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_source_names_the_instruction_of_its_tile(dtype: torch.dtype) -> None:
    text = source(dtype, "silu", 16, FewConfig(112, 1, 7))
    short = {BF16: "bf16", F16: "f16"}[dtype]
    assert f'"m64n112k16.f32.{short}.{short}"' in text
    assert '"+f"(d[55])' in text and '"+f"(d[56])' not in text


def test_a_cpu_has_other_kernels() -> None:
    x, weight = torch.zeros(8, 64, dtype=BF16), torch.zeros(1024, 64, dtype=BF16)
    assert not can_few_gemm(x, weight)


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "is_available", lambda _: True)
    x, weight = torch.zeros(8, 64, dtype=BF16), torch.zeros(2048, 64, dtype=BF16)
    assert can_few_gemm(x, weight) and can_few_gemm(x, weight, "silu")
    assert can_few_gemm(x, weight, None, torch.zeros(8, 2048, dtype=BF16))
    assert not can_few_gemm(x, weight, None, torch.zeros(8, 2048)), "it adds to numbers of the same kind"
    assert not can_few_gemm(x, weight, "gelu")
    some, many = torch.zeros(few.MOST_TOKENS, 64, dtype=BF16), torch.zeros(few.MOST_TOKENS + 1, 64, dtype=BF16)
    assert can_few_gemm(some, weight) and not can_few_gemm(some, weight, "silu"), "gate and up have another kernel"
    assert can_few_gemm(some[: few.MOST_GATED_TOKENS], weight, "silu")
    head = torch.empty(few.MANY_COLUMNS + 8, 64, dtype=BF16, device="meta")
    assert can_few_gemm(some[:32], head) and not can_few_gemm(some[:33], head), "of a head cuBLAS takes more"
    assert not can_few_gemm(x[:1], weight) and not can_few_gemm(many, weight)
    assert not can_few_gemm(x, weight[:512]), "a few tiles leave most multiprocessors idle"
    assert not can_few_gemm(x.float(), weight.float())
    assert not can_few_gemm(torch.zeros(8, 96, dtype=BF16), torch.zeros(2048, 96, dtype=BF16))


def test_gate_and_up_go_to_the_kernel_with_the_smaller_tiles() -> None:
    assert gated_gemm.most_columns(1, 14336, SMS) == few.most_columns(14336, 4096, SMS) == 112
    assert gated_gemm.most_columns(1, 18944, SMS) == 192 and few.most_columns(18944, 3584, SMS) == 144


def check(
    num_tokens: int,
    n: int,
    k: int,
    *,
    act: str | None = None,
    has_bias: bool = True,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = BF16,
    config: FewConfig | None = None,
) -> None:
    generator = torch.Generator("cuda").manual_seed(num_tokens + n)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    num_rows = 2 * n if act else n
    x, weight = randn(num_tokens, k).to(dtype), (randn(num_rows, k) * k**-0.5).to(dtype)
    bias = randn(num_rows).to(dtype) if has_bias else None
    residual = None if act or out_dtype else randn(num_tokens, n).to(dtype)
    expected = (x.double() @ weight.double().t() + (0 if bias is None else bias.double())).float()
    if act:
        expected = act_and_mul_torch(expected, act)
    if residual is not None:
        expected = expected + residual.float()
    options: dict[str, Any] = {"act": act, "out_dtype": out_dtype, "config": config}
    found = [
        few_gemm(x, weight, bias, residual=None if residual is None else residual.clone(), **options) for _ in range(2)
    ]
    assert found[0].shape == expected.shape and found[0].dtype == (out_dtype or dtype)
    assert torch.equal(*found)
    # Of each output by itself: a tile left out would hide in a norm over all. Tensor cores cut the sums they add to.
    rounding = 1e-4 if out_dtype else 2 * torch.finfo(dtype).eps
    assert ((found[0].float() - expected).abs() <= rounding * expected.abs().clamp(min=1.0)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [2, 5, 8, 9, 16, 17, 32, 33, 48, 50, 64])
def test_the_kernel_equals_its_twin_for_any_number_of_tokens(num_tokens: int) -> None:
    check(num_tokens, 1000, 704)
    check(num_tokens, 1000, 704, act="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [65, 72, 96, 127, 128])
@pytest.mark.parametrize(("n", "k"), [(1000, 704), (6144, 4096), (2048, 4096), (264, 64), (40_000, 128)])
def test_two_tiles_of_tokens_equal_their_twin(n: int, k: int, num_tokens: int) -> None:
    check(num_tokens, n, k)
    check(num_tokens, n, k, has_bias=False, out_dtype=F32)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (32000, 1024), (3584, 3584), (8, 128), (264, 64)])
def test_the_kernel_equals_its_twin_for_models_of_any_size(n: int, k: int) -> None:
    check(16, n, k)
    check(16, n, k, out_dtype=F32)
    check(16, n, k, act="gelu_tanh", has_bias=False)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gate_and_up_equal_their_twins(dtype: torch.dtype, act: str) -> None:
    check(13, 14336, 4096, act=act, dtype=dtype, has_bias=False)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [(8, 4, 3), (24, 3, 2), (72, 1, 5), (128, 2, 2)])
def test_the_kernel_equals_its_twin_with_any_tile(config: tuple[int, int, int]) -> None:
    for num_tokens in (7, 12):
        check(num_tokens, 2000, 832, config=FewConfig(*config))
        check(num_tokens, 2000, 832, config=FewConfig(*config), act="silu")

"""Products of a weight and a few tokens for `kernels.dense`.

The tokens are too many for `triton_gemm` and too few for cuBLAS to be fast. The time is still that of reading the
weight, if enough of it is on its way at any moment. So each program has few rows of the weight, all of K, which its
warps share; and what they read first is on its way to the L2 cache before the kernel ahead has ended (programmatic
dependent launch).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch, next_power_of_2
from kernels.triton_elementwise import gated, launch_options, prefetch_to_l2
from kernels.triton_gemm import rows_of_program
from kernels.tuning import Configs

MIN_BLOCK_T = 16  # rows of a tensor core's matrix
MOST_TOGETHER, MOST_TOKENS = 32, 256  # tokens that a program takes; that programs of 16 share out, of small weights
MIN_BLOCK_K = 64
ALIGNED = 8  # columns that are copied together
PREFETCH_PIECE = tl.constexpr(64)  # elements that a thread asks for at once


class SkinnyConfig(NamedTuple):
    """Say how `skinny_gemm` cuts a weight.

    A program has block_n rows (with an activation, of gate and of up each). Each of its warps has block_k elements of
    them at a time, num_stages times over on their way; of each row `prefetch` elements are asked for early.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    prefetch: int = 512


def default_skinny_config(k: int, block_t: int) -> SkinnyConfig:
    """Return the configuration of shapes that no table has; it divides every K of whole pieces."""
    if k % (2 * MIN_BLOCK_K):
        return SkinnyConfig(8, MIN_BLOCK_K, 4, 6)
    num_warps = 4 if k % (4 * MIN_BLOCK_K) == 0 else 2
    if block_t <= MIN_BLOCK_T or k % (2 * MIN_BLOCK_K * num_warps):
        return SkinnyConfig(16, MIN_BLOCK_K, num_warps, 6)
    return SkinnyConfig(16, 2 * MIN_BLOCK_K, num_warps, 3)


# By (weight rows, K, most tokens: 16, 32, or 256).
SKINNY_CONFIGS = Configs("skinny", SkinnyConfig, lambda _num_rows, k, block_t: default_skinny_config(k, block_t))


def fits_skinny(k: int, *, is_small: bool = False) -> bool:
    """Return whether `skinny_gemm` is fast for a weight with K columns.

    is_small: the weight's bytes take no time, so that it does not matter that programs ask for some beyond K.
    """
    return k % (ALIGNED if is_small else 2 * MIN_BLOCK_K) == 0


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: SkinnyConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight.T + bias [T, N] of up to 256 tokens x [T, K] and weight [N, K], all contiguous.

    More than 32 are shared out by 16 to programs that read the weight again: for small ones, as routers have.

    act: the weight is [2N, K], gate and up, and the result is act(gate) * up. residual [T, N]: the product is added to
    it, in place, and it is returned. out_dtype: what a result that is not a sum is rounded to, x's own by default.
    Results do not depend on `config` but for rounding.
    """
    num_tokens, k = x.shape
    num_rows = weight.shape[0]
    n = num_rows // 2 if act else num_rows
    most = block_t = max(MIN_BLOCK_T, next_power_of_2(num_tokens))
    if num_tokens > MOST_TOGETHER:
        most, block_t = MOST_TOKENS, MIN_BLOCK_T
    config = config or SKINNY_CONFIGS.get(x.device, num_rows, k, most)
    out = torch.empty(num_tokens, n, dtype=out_dtype or x.dtype, device=x.device) if residual is None else residual
    _skinny_kernel[(cdiv(n, config.block_n), cdiv(num_tokens, block_t))](
        x,
        weight,
        bias,
        residual,
        out,
        num_tokens,
        n,
        K=k,
        BLOCK_T=block_t,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_WARPS=config.num_warps,
        PREFETCH=min(config.prefetch, 1 << (k.bit_length() - 1)),
        ACT=act,
        num_stages=config.num_stages,
        **launch_options(x.device, config.num_warps),
    )
    return out


@fast_launch
@triton.jit(do_not_specialize=["num_tokens"])
def _skinny_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    num_tokens,
    n,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PREFETCH: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first, row_starts, gate, up = rows_of_program(weight, n, K, BLOCK_N)
    i = tl.arange(0, BLOCK_N)
    if PDL:
        pieces = row_starts[:, None] + tl.arange(0, PREFETCH // PREFETCH_PIECE)[None, :] * PREFETCH_PIECE
        prefetch_to_l2(gate + pieces, PREFETCH_PIECE)
        if ACT is not None:
            prefetch_to_l2(up + pieces, PREFETCH_PIECE)
        tl.extra.cuda.gdc_wait()

    # Of a batch of matrices tl.dot gives each warp one: so they share K, which they take turns with.
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, NUM_WARPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_token = t < num_tokens
    x_pointers = x + t[None, :, None] * K + k[:, None, :]
    offsets = row_starts[None, None, :] + k[:, :, None]
    sums = tl.zeros([NUM_WARPS, BLOCK_T, BLOCK_N], tl.float32)
    up_sums = sums
    for start in range(0, K, NUM_WARPS * BLOCK_K):
        if K % (NUM_WARPS * BLOCK_K) == 0:
            x_tile = tl.load(x_pointers + start, mask=is_token[None, :, None], other=0.0)
            tile = tl.load(gate + offsets + start)
        else:
            is_input = k < K - start
            x_tile = tl.load(x_pointers + start, mask=is_token[None, :, None] & is_input[:, None, :], other=0.0)
            tile = tl.load(gate + offsets + start, mask=is_input[:, :, None], other=0.0)
        sums = tl.dot(x_tile, tile, sums, input_precision="ieee")
        if ACT is not None:
            if K % (NUM_WARPS * BLOCK_K) == 0:
                tile = tl.load(up + offsets + start)
            else:
                tile = tl.load(up + offsets + start, mask=is_input[:, :, None], other=0.0)
            up_sums = tl.dot(x_tile, tile, up_sums, input_precision="ieee")

    y = tl.sum(sums, axis=0)
    is_row = first + i < n
    if bias is not None:
        y += tl.load(bias + first + i, mask=is_row, other=0.0).to(tl.float32)[None, :]
    if ACT is not None:
        z = tl.sum(up_sums, axis=0)
        if bias is not None:
            z += tl.load(bias + n + first + i, mask=is_row, other=0.0).to(tl.float32)[None, :]
        y = gated(y, z, ACT)
    places = t[:, None] * n + first + i[None, :]
    mask = is_token[:, None] & is_row[None, :]
    if residual is not None:
        y += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)

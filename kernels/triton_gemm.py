"""Matrix-vector products for `kernels.dense`.

A few tokens leave the tensor cores idle: the time is that of reading the weights, and `_gemv_kernel` streams them at
the memory's speed. It starts reading before the kernel ahead of it has ended (programmatic dependent launch), so that
one product's tail and the next one's start overlap.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch, has_dependent_launch, next_power_of_2
from kernels.triton_elementwise import gated
from kernels.tuning import Configs


class GemvConfig(NamedTuple):
    """Say how `gemv` cuts a weight.

    A program has block_n rows for one token (for more tokens fewer: the accumulators share the registers), and reads
    block_k elements of each at a time; `prefetch` such pieces are on their way before it waits for its input.
    block_k = 256 * num_warps gives each thread one 16-byte access a row and piece.
    """

    block_n: int
    block_k: int
    num_warps: int
    prefetch: int


def default_gemv_config(num_rows: int, k: int) -> GemvConfig:
    """Return the configuration of shapes that no table has."""
    num_warps = 2 if k <= 512 else 4 if k <= 4096 else 8
    return GemvConfig(4 if num_rows >= 4096 else 2, 256 * num_warps, num_warps, prefetch=4)


GEMV_CONFIGS = Configs("gemv", GemvConfig, default_gemv_config)  # by (weight rows, K), for one token


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    normed: torch.Tensor | None = None,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight.T + bias [T, N] of a few tokens x [T, K] and weight [N, K], with more fused in.

    norm_weight [K], eps: x is RMS-normed first. act: the weight is [2N, K], gate and up, and the result is
    act(gate) * up. residual [T, N]: the product is added to it, in place, and it is returned. out_dtype: what a result
    that is not a sum is rounded to, x's own by default. normed [T, K]: where the normed x is written, too.
    Results do not depend on `config` but for rounding.
    """
    num_tokens, k = x.shape
    num_rows = weight.shape[0]
    n = num_rows // 2 if act else num_rows
    config = config or GEMV_CONFIGS.get(x.device, num_rows, k)
    num_sums = next_power_of_2(num_tokens) * (2 if act else 1)
    block_n = max(1, config.block_n // num_sums)
    out = torch.empty(num_tokens, n, dtype=out_dtype or x.dtype, device=x.device) if residual is None else residual
    pdl = has_dependent_launch(x.device)
    _gemv_kernel[(cdiv(n, block_n),)](
        x,
        weight,
        bias,
        norm_weight,
        residual,
        out,
        normed,
        n,
        eps,
        K=k,
        NUM_TOKENS=num_tokens,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        PREFETCH=min(config.prefetch, cdiv(k, config.block_k)),
        NORMED=0 if normed is None else next_power_of_2(cdiv(k, cdiv(n, block_n))),
        ACT=act,
        PDL=pdl,
        num_warps=config.num_warps,
        launch_pdl=pdl,
    )
    return out


@fast_launch
@triton.jit
def _gemv_kernel(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    out,
    normed,
    N,
    eps,
    K: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    NORMED: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    first, row_starts, gate, up = rows_of_program(weight, N, K, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    is_row = first + n < N

    # Weights depend on no kernel: what is loaded here comes in while the one ahead still runs.
    gate_tiles = ()
    up_tiles = ()
    norm_tiles = ()
    for piece in tl.static_range(PREFETCH):
        gate_tiles = gate_tiles + (_load_rows(gate, row_starts, piece, K, BLOCK_K),)
        if ACT is not None:
            up_tiles = up_tiles + (_load_rows(up, row_starts, piece, K, BLOCK_K),)
        if norm_weight is not None:
            norm_tiles = norm_tiles + (_load_piece(norm_weight, piece, K, BLOCK_K),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    added = ()
    gate_sums = ()
    up_sums = ()
    squares = ()
    for t in tl.static_range(NUM_TOKENS):
        if residual is not None:
            added = added + (tl.load(residual + t * N + first + n, mask=is_row, other=0.0).to(tl.float32),)
        gate_sums = gate_sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        up_sums = up_sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        squares = squares + (tl.zeros([BLOCK_K], tl.float32),)

    for piece in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        if piece < PREFETCH:
            gate_tile = gate_tiles[piece]
        else:
            gate_tile = _load_rows(gate, row_starts, piece, K, BLOCK_K)
        gate_tile = gate_tile.to(tl.float32)
        if ACT is not None:
            if piece < PREFETCH:
                up_tile = up_tiles[piece]
            else:
                up_tile = _load_rows(up, row_starts, piece, K, BLOCK_K)
            up_tile = up_tile.to(tl.float32)
        if norm_weight is not None:
            if piece < PREFETCH:
                norm_tile = norm_tiles[piece]
            else:
                norm_tile = _load_piece(norm_weight, piece, K, BLOCK_K)
            norm_tile = norm_tile.to(tl.float32)
        new_gate_sums = ()
        new_up_sums = ()
        new_squares = ()
        for t in tl.static_range(NUM_TOKENS):
            values = _load_piece(x + t * K, piece, K, BLOCK_K).to(tl.float32)
            new_squares = new_squares + (squares[t] + values * values,)
            if norm_weight is not None:
                values *= norm_tile
            new_gate_sums = new_gate_sums + (gate_sums[t] + gate_tile * values[None, :],)
            if ACT is not None:
                new_up_sums = new_up_sums + (up_sums[t] + up_tile * values[None, :],)
        gate_sums = new_gate_sums
        up_sums = new_up_sums
        squares = new_squares

    for t in tl.static_range(NUM_TOKENS):
        y = tl.sum(gate_sums[t], axis=1)
        if norm_weight is not None:
            # The product is linear: scaling its result spares a pass over x ahead of it.
            scale = tl.rsqrt(tl.sum(squares[t], axis=0) / K + eps)
            y *= scale
        if bias is not None:
            y += tl.load(bias + first + n, mask=is_row, other=0.0).to(tl.float32)
        if ACT is not None:
            z = tl.sum(up_sums[t], axis=1)
            if norm_weight is not None:
                z *= scale
            if bias is not None:
                z += tl.load(bias + N + first + n, mask=is_row, other=0.0).to(tl.float32)
            y = gated(y, z, ACT)
        if residual is not None:
            y += added[t]
        tl.store(out + t * N + first + n, y.to(out.dtype.element_ty), mask=is_row)
        if normed is not None:
            _store_normed(normed + t * K, x + t * K, norm_weight, scale, K, NORMED)


@triton.jit
def _store_normed(normed, x, norm_weight, scale, K: tl.constexpr, NORMED: tl.constexpr):
    """Write the NORMED columns of this program of a token x, normed by `scale`, rounded as `rms_norm` does."""
    k = tl.program_id(0) * NORMED + tl.arange(0, NORMED)
    weight = tl.load(norm_weight + k, mask=k < K, other=0.0)
    values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32) * scale
    tl.store(normed + k, (values.to(weight.dtype) * weight).to(normed.dtype.element_ty), mask=k < K)


@triton.jit
def rows_of_program(weight, n, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return where the rows of a program are.

    (Its first row of [n, K], where its BLOCK_N rows start behind that, that row's address in the first n rows of
    `weight`, in the second n rows.)
    """
    first = tl.program_id(0) * BLOCK_N
    row_starts = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first) * K  # rows past the end read the last one
    gate = weight + first.to(tl.int64) * K
    return first, row_starts, gate, gate + tl.cast(n, tl.int64) * K


@triton.jit
def _load_rows(weight, row_starts, piece: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a [BLOCK_N, BLOCK_K] piece of the rows, with zeros past their end."""
    k = piece * BLOCK_K + tl.arange(0, BLOCK_K)
    pointers = weight + row_starts[:, None] + k[None, :]
    if (piece + 1) * BLOCK_K <= K:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_piece(x, piece: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = piece * BLOCK_K + tl.arange(0, BLOCK_K)
    if (piece + 1) * BLOCK_K <= K:
        return tl.load(x + k)
    else:
        return tl.load(x + k, mask=k < K, other=0.0)

"""Products of many tokens whose inputs are 8 bits, as the weight's codes are: first the codes', then the scales."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch
from kernels.triton_elementwise import launch_options, wait_for_input


class GemmConfig(NamedTuple):
    """Say how `gemm_8bit` cuts a product: tiles of block_m tokens by block_n rows, block_k columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # tiles of tokens that are made next to each other, so that they share what the L2 cache holds


def default_gemm_config(num_tokens: int, is_grouped: bool) -> GemmConfig:
    """Return a configuration for a card like the H100."""
    if num_tokens <= 64:
        return GemmConfig(64, 64, 128, 4, 4)
    if num_tokens <= 256 or is_grouped:
        return GemmConfig(128, 128, 128, 8, 4)
    return GemmConfig(128, 256, 128, 8, 3)


def gemm_8bit(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """Return residual + x W^T + bias [T, N] of codes x [T, K] and weight [N, K], of the same 8-bit dtype.

    x_scale [T, 1 or K / 128] and scale [1 or K / 128, N], float32: what the codes are multiplied by. residual: [T, N],
    overwritten by the result, which is then returned. K is a multiple of 64, of 128 where there are several scales.
    """
    num_tokens, k = x.shape
    n, is_grouped = len(weight), x_scale.shape[1] > 1 or len(scale) > 1
    config = config or default_gemm_config(num_tokens, is_grouped)
    block_k = config.block_k if k % config.block_k == 0 else 64
    out = torch.empty(num_tokens, n, dtype=out_dtype, device=x.device) if residual is None else residual
    _gemm_8bit_kernel[(cdiv(num_tokens, config.block_m) * cdiv(n, config.block_n),)](
        x,
        weight,
        x_scale,
        scale,
        bias,
        residual,
        out,
        num_tokens,
        n,
        K=k,
        X_GROUPS=x_scale.shape[1],
        W_GROUPS=len(scale),
        IS_INTEGER=weight.dtype == torch.int8,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        num_stages=config.num_stages,
        **launch_options(x.device, config.num_warps),
    )
    return out


@fast_launch
@triton.jit(do_not_specialize=["num_tokens"])
def _gemm_8bit_kernel(
    x,
    weight,
    x_scale,
    scale,
    bias,
    residual,
    out,
    num_tokens,
    n,
    K: tl.constexpr,
    X_GROUPS: tl.constexpr,
    W_GROUPS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    pid = tl.program_id(0)
    num_m = tl.cdiv(num_tokens, BLOCK_M)
    num_n = tl.cdiv(n, BLOCK_N)
    first_m = pid // (GROUP_M * num_n) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * num_n) % size_m
    pid_n = pid % (GROUP_M * num_n) // size_m

    token = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_token = tl.minimum(token, num_tokens - 1)
    safe_row = tl.minimum(row, n - 1)
    column = tl.arange(0, BLOCK_K)
    x_pointers = x + safe_token.to(tl.int64)[:, None] * K + column[None, :]
    w_pointers = weight + safe_row.to(tl.int64)[None, :] * K + column[:, None]
    IS_GROUPED: tl.constexpr = X_GROUPS > 1 or W_GROUPS > 1
    ACCUMULATOR: tl.constexpr = tl.int32 if IS_INTEGER else tl.float32
    if IS_GROUPED:
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(K // BLOCK_K):
            sums = tl.dot(tl.load(x_pointers), tl.load(w_pointers), out_dtype=ACCUMULATOR)
            group = step * BLOCK_K * X_GROUPS // K
            factor = tl.load(x_scale + safe_token * X_GROUPS + group)
            group = step * BLOCK_K * W_GROUPS // K
            y += sums.to(tl.float32) * factor[:, None] * tl.load(scale + group * n + safe_row)[None, :]
            x_pointers += BLOCK_K
            w_pointers += BLOCK_K
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
        for _ in range(K // BLOCK_K):
            sums = tl.dot(tl.load(x_pointers), tl.load(w_pointers), sums, out_dtype=ACCUMULATOR)
            x_pointers += BLOCK_K
            w_pointers += BLOCK_K
        y = sums.to(tl.float32) * tl.load(x_scale + safe_token)[:, None] * tl.load(scale + safe_row)[None, :]
    if bias is not None:
        y += tl.load(bias + safe_row).to(tl.float32)[None, :]
    places = token.to(tl.int64)[:, None] * n + row[None, :]
    mask = (token < num_tokens)[:, None] & (row < n)[None, :]
    if residual is not None:
        y += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)

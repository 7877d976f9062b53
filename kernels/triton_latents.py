"""The kernel of `kernels.latents`: products of a few tokens, each head's with a matrix of its own.

Like `triton_skinny` it reads the matrices before the kernel ahead has ended, which cuBLAS's batched products do not.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch, next_power_of_2
from kernels.triton_elementwise import launch_options

MIN_BLOCK_T = 16  # rows of a tensor core's matrix
BLOCK_WEIGHTS = 8192  # of a head's matrix that a program holds
MIN_BLOCK_OUT = 16


def head_products(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write x @ weight of each head into `out`: x [T, H, I] and weight [H, I, O], of any strides but x's last.

    T is `FEW_TOKENS` at most.
    """
    num_tokens, num_heads, num_in = x.shape
    num_out = weight.shape[2]
    block_in = next_power_of_2(num_in)
    block_out = max(MIN_BLOCK_OUT, min(BLOCK_WEIGHTS // block_in, next_power_of_2(num_out)))
    _head_products_kernel[(cdiv(num_out, block_out), num_heads)](
        x, weight, out, num_tokens, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        W_HEAD=weight.stride(0), W_IN=weight.stride(1), W_OUT=weight.stride(2), NUM_IN=num_in, NUM_OUT=num_out,
        BLOCK_T=max(MIN_BLOCK_T, next_power_of_2(num_tokens)), BLOCK_IN=block_in, BLOCK_OUT=block_out,
        **launch_options(x.device, num_warps=4),
    )  # fmt: skip


@fast_launch
@triton.jit(do_not_specialize=["num_tokens"])
def _head_products_kernel(
    x, weight, out, num_tokens, X_STRIDE, X_HEAD, OUT_STRIDE, OUT_HEAD,
    W_HEAD: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr, NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK_IN)
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_weight = (i < NUM_IN)[:, None] & (o < NUM_OUT)[None, :]
    tile = tl.load(weight + head * W_HEAD + i[:, None] * W_IN + o[None, :] * W_OUT, mask=is_weight, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.arange(0, BLOCK_T)
    is_token = (t < num_tokens)[:, None]
    sources = x + t[:, None] * X_STRIDE + head * X_HEAD + i[None, :]
    values = tl.load(sources, mask=is_token & (i < NUM_IN)[None, :], other=0.0)
    y = tl.dot(values, tile, input_precision="ieee")
    places = out + t[:, None] * OUT_STRIDE + head * OUT_HEAD + o[None, :]
    tl.store(places, y.to(out.dtype.element_ty), mask=is_token & (o < NUM_OUT)[None, :])

"""The Triton kernel of `resize`."""

import math

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch
from kernels.resize_plan import WEIGHT_BITS, Plan

BLOCK = 256


def pass_triton(frames: torch.Tensor, plan: Plan, dim: int) -> torch.Tensor:
    frames = frames.contiguous()
    first, weights = plan.first.to(frames.device), plan.weights.to(frames.device)
    new_length, num_taps = weights.shape
    made = frames.new_empty((*frames.shape[:dim], new_length, *frames.shape[dim + 1 :]))
    num_inner = math.prod(frames.shape[dim + 1 :])
    num_blocks = cdiv(new_length * num_inner, BLOCK)
    _resize_kernel[(math.prod(frames.shape[:dim]) * num_blocks,)](
        frames, first, weights, made, frames.shape[dim], new_length, num_inner, num_taps, num_blocks,
        BITS=WEIGHT_BITS, BLOCK=BLOCK,
    )  # fmt: skip
    return made


@fast_launch
@triton.jit(do_not_specialize=["length", "new_length", "num_inner", "num_taps", "num_blocks"])
def _resize_kernel(
    frames, first, weights, made, length, new_length, num_inner, num_taps, num_blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    outer = (tl.program_id(0) // num_blocks).to(tl.int64)
    place = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = place < new_length * num_inner
    pixel = place // num_inner
    start = tl.load(first + pixel, mask=mask, other=0)
    frames += outer * length * num_inner + place % num_inner
    total = tl.full((BLOCK,), 1 << (BITS - 1), tl.int32)
    for tap in range(num_taps):
        weight = tl.load(weights + pixel * num_taps + tap, mask=mask, other=0)
        byte = tl.load(frames + (start + tap) * num_inner, mask=mask & (start + tap < length), other=0)
        total += weight * byte.to(tl.int32)
    total = tl.minimum(tl.maximum(total >> BITS, 0), 255)
    tl.store(made + outer * new_length * num_inner + place, total.to(tl.uint8), mask=mask)

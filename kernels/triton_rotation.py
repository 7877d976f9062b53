"""The Triton kernel of `packed_attention.rotate`."""

import torch
import triton
import triton.language as tl

from kernels.launch import fast_launch, next_power_of_2


def rotate_triton(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    num_tokens, num_heads, head_dim = heads.shape
    half = head_dim // 2
    # Without fused operations a product is rounded before it is added, as in torch.
    _rotate_kernel[(num_tokens,)](
        heads, cos.contiguous(), sin.contiguous(), heads.stride(0), NUM_HEADS=num_heads, HALF=half,
        BLOCK_HEADS=next_power_of_2(num_heads), BLOCK_HALF=next_power_of_2(half), enable_fp_fusion=False,
    )  # fmt: skip


@fast_launch
@triton.jit
def _rotate_kernel(
    heads, cos, sin, stride,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    angles, is_angle = token * 2 * HALF + place, place < HALF
    cos_first = tl.load(cos + angles, mask=is_angle, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angles + HALF, mask=is_angle, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angles, mask=is_angle, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angles + HALF, mask=is_angle, other=0.0).to(tl.float32)
    heads += token * stride + head * 2 * HALF + place
    mask = (head < NUM_HEADS) & is_angle
    first = tl.load(heads, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(heads, (first * cos_first - second * sin_first).to(heads.dtype.element_ty), mask=mask)
    tl.store(heads + HALF, (second * cos_second + first * sin_second).to(heads.dtype.element_ty), mask=mask)

"""What our CUDA kernels for Hopper share: whether they run, their instructions, and maps for the accelerator's copies.

`hopper.cu` has the instructions.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kernels.card import card_of
from kernels.nvrtc import check, has_nvrtc, joined

ARCHITECTURE = "sm_90a"  # with the instructions that Hopper alone has


@functools.cache
def is_available(device: torch.device) -> bool:
    """Return whether `device` is a Hopper GPU and NVRTC can compile for it."""
    return device.type == "cuda" and card_of(device).is_hopper and has_nvrtc()


def source(file: str, defines: Mapping[str, object]) -> str:
    """Return a kernel's source for NVRTC, with `defines` and the instructions in front."""
    return joined(defines, "hopper.cu", file)


def tensor_map(
    kind: str,
    pointer: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    is_swizzled: bool = True,
) -> Any:
    """Describe a tensor to the tensor memory accelerator, which reads boxes of it, and zeros past its end.

    kind: of its numbers, in CUDA's words ("BFLOAT16"). sizes, box: the dimension that lies together first. strides: in
    bytes, of the dimensions behind it.
    """
    from cuda.bindings import driver  # here: only torch's CUDA builds bring it

    u64, u32, swizzles = driver.cuuint64_t, driver.cuuint32_t, driver.CUtensorMapSwizzle
    return check(
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
            len(sizes),
            pointer,
            [u64(size) for size in sizes],
            [u64(stride) for stride in strides],
            [u32(size) for size in box],
            [u32(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if is_swizzled else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def kind_of(dtype: torch.dtype) -> str:
    """Return how CUDA calls a type of 16 bits."""
    return {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}[dtype]

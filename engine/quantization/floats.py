"""Weights of 8-bit and 4-bit floats: how their scales, of rows, blocks or groups, become those of rows."""

from collections.abc import Mapping
from typing import Any

import torch

from engine.quantization import With
from engine.quantization.bits import check_floats
from engine.quantization.packed import Stored
from kernels.quantized import FP8, Format
from kernels.weights import ShapeError

NVFP4_GROUP, MX_GROUP = 16, 32
E8M0_BIAS = 127


def row_scales(scale: torch.Tensor, block_rows: int = 1) -> torch.Tensor:
    """Return float32 scales of rows: of all (one number), of each row, or of blocks of rows, which are repeated."""
    check_floats(scale)
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() == 4:  # ModelOpt's [blocks, 1, blocks, 1]
        scale = scale.flatten(0, 1).flatten(1)
    return scale.repeat_interleave(block_rows, 0) if block_rows > 1 else scale


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 numbers that `exponents` hold, as bfloat16, which has all of them."""
    if exponents.dtype == torch.float8_e8m0fnu:  # which knows what it is
        return exponents.to(torch.bfloat16)
    if exponents.dtype != torch.uint8:
        raise ShapeError(f"is of {exponents.dtype}, scales of powers of two are bytes")
    return torch.exp2(exponents.float() - E8M0_BIAS).to(torch.bfloat16)


def stored_fp8(
    *,
    weight: str = "weight",
    scales: tuple[str, ...] = ("weight_scale",),
    block: tuple[int, int] | None = None,
    rounds_inputs: bool = True,
    has_input_scale: bool = False,
    input_scales: tuple[str, ...] = ("input_scale",),
) -> Stored:
    """Return how e4m3 numbers are stored, with scales that multiply them.

    weight: its name. scales, input_scales: those that may be of them. block: its rows and columns; None: scales are of
    rows, or one for all. has_input_scale: that of inputs is known beforehand; else every token, or block of columns,
    has its own.
    """
    block_rows, block_columns = block or (1, 0)
    form = Format(
        "fp8",
        block_columns,
        inputs="fp8" if rounds_inputs else None,
        input_group=block_columns if rounds_inputs else 0,
        has_input_scale=rounds_inputs and has_input_scale,
    )

    def of_blocks(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return row_scales(scale, block_rows)[: len(weight)]

    of_rows = row_scales if block is None else With((weight,), of_blocks)
    of_inputs = ("input_scale",) if form.has_input_scale else None
    return Stored(
        form,
        {
            weight: ("weight" if weight == "weight" else "codes",),
            **dict.fromkeys(scales, ("scale", of_rows)),
            **dict.fromkeys(input_scales, of_inputs),
            "input_scale_ub": None,
            "weight_shape": None,
        },
    )


def stored_nvfp4(weight: str, global_scale: str, *, divides: bool, group_size: int = NVFP4_GROUP) -> Stored:
    """Return how NVFP4's numbers are stored, whose groups have e4m3 scales, and these one of all.

    weight, global_scale: their names. divides: the scale of all does, rather than multiply. Inputs are not rounded.
    """

    def product(scale: torch.Tensor, of_all: torch.Tensor) -> torch.Tensor:
        if scale.dtype != FP8:
            raise ShapeError(f"is of {scale.dtype}, NVFP4's scales are of {FP8}")
        if of_all.numel() != 1:
            raise ShapeError(f"has {of_all.numel()} numbers in {global_scale} beside it, NVFP4 has one")
        check_floats(of_all)
        of_all = of_all.to(scale.device).float()
        return scale.float() / of_all if divides else scale.float() * of_all

    return Stored(
        Format("int4", group_size, table="fp4", scale_dtype=torch.float16),
        {
            weight: ("weight" if weight == "weight" else "codes",),
            "weight_scale": ("scale", With((global_scale,), product)),
            **NOT_OF_WEIGHTS,
            global_scale: None,
        },
    )


def stored_mxfp4(weight: str, scale: str = "weight_scale") -> Stored:
    """Return how MXFP4's numbers are stored: groups of 32 with powers of two. Inputs are not rounded."""
    return Stored(
        Format("int4", MX_GROUP, table="fp4", scale_dtype=torch.bfloat16),
        {
            weight: ("weight" if weight == "weight" else "codes",),
            scale: ("scale", power_of_two),
            **NOT_OF_WEIGHTS,
        },
    )


def stored_mxfp8() -> Stored:
    """Return how MXFP8's numbers are stored: e4m3, groups of 32 with powers of two. Inputs are not rounded."""
    return Stored(
        Format("fp8", MX_GROUP, scale_dtype=torch.bfloat16),
        {"weight": ("weight",), "weight_scale": ("scale", power_of_two), **NOT_OF_WEIGHTS},
    )


# Of inputs, where these are not rounded.
NOT_OF_WEIGHTS: Mapping[str, Any] = dict.fromkeys(("input_scale", "input_zero_point", "input_global_scale"))

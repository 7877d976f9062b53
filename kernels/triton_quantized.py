"""The Triton kernels of weights of few bits: dequantizing, looking up rows, rounding inputs, and 8-bit products.

Codes in tiles lie as `kernels.quantized_layout` says.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.card import OLDEST_E4M3, card_of
from kernels.launch import cdiv, fast_launch, next_power_of_2
from kernels.quantized_format import FP8
from kernels.triton_elementwise import launch_options, wait_for_input

_CODES = {torch.int32: "int4", torch.int8: "int8", FP8: "fp8"}  # by the dtype of codes in tiles
BLOCK_CHUNKS = 4  # of 64 columns, of a program that dequantizes


def dequantize_tiles(
    codes: torch.Tensor,
    parameters: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    first_tile: int,
    *,
    group_size: int,
    offset: str | None,
    table: torch.Tensor | None,
) -> torch.Tensor:
    """Write rows of W, from 16 first_tile on, to `out` [rows, k]; the arguments are those of `CudaQuantizedWeight`."""
    num_rows, num_chunks = len(out), codes.shape[1]
    _dequantize_tiles_kernel[(cdiv(num_rows, 16), cdiv(num_chunks, BLOCK_CHUNKS))](
        _bytes_of(codes),
        parameters,
        scale,
        table,
        out,
        first_tile,
        num_rows,
        num_chunks,
        parameters.shape[1] if parameters is not None else 1,
        CODE=_CODES[codes.dtype],
        GROUP=group_size,
        OFFSET=offset,
        CHUNKS=BLOCK_CHUNKS,
        **launch_options(out.device, num_warps=4),
    )
    return out


@fast_launch
@triton.jit(do_not_specialize=["first_tile", "num_rows"])
def _dequantize_tiles_kernel(
    codes,
    parameters,
    scale,
    table,
    out,
    first_tile,
    num_rows,
    num_chunks,
    num_groups,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    tile = first_tile + tl.program_id(0)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    start = tile.to(tl.int64) * num_chunks
    is_chunk = chunk < num_chunks
    # A thread's words: [chunk, r, t and j, u and v]. Scales are as many as there are groups, not numbers.
    column = chunk[:, None, None, None] * 64
    if GROUP > 0 and GROUP < 64:
        column += (tl.arange(0, 16) % 4 * 16)[None, None, :, None]
    is_column = (column >= 0) & (column < num_chunks * 64)
    r = tl.arange(0, 8)[None, :, None, None]
    if CODE == "int4":
        word = tl.arange(0, 128)
        words = tl.load(codes + (start + chunk)[:, None] * 128 + word[None, :], mask=is_chunk[:, None], other=0)
        words = tl.reshape(words, [CHUNKS, 8, 16])
        low = tl.reshape(_nibbles_of_half(words, 0, table), [CHUNKS, 8, 16, 4])
        high = tl.reshape(_nibbles_of_half(words, 1, table), [CHUNKS, 8, 16, 4])
        low = _scaled_tile(low, parameters, scale, tile, r, column, num_rows, num_groups, is_column, GROUP, OFFSET)
        high = _scaled_tile(
            high, parameters, scale, tile, 8 + r, column, num_rows, num_groups, is_column, GROUP, OFFSET
        )
        # Rounded before they change places, which takes the time that their bytes do.
        values = tl.join(low.to(out.dtype.element_ty), high.to(out.dtype.element_ty))
        # [chunk, r, t, j, u, v, half]
        values = tl.permute(tl.reshape(values, [CHUNKS, 8, 4, 4, 2, 2, 2]), [6, 1, 0, 3, 4, 2, 5])
    else:
        byte = tl.arange(0, 1024)
        numbers = tl.load(codes + (start + chunk)[:, None] * 1024 + byte[None, :], mask=is_chunk[:, None], other=0)
        values = tl.reshape(number_of(numbers, CODE), [CHUNKS, 16, 16, 4])
        rows = tl.arange(0, 16)[None, :, None, None]
        values = _scaled_tile(
            values, parameters, scale, tile, rows, column, num_rows, num_groups, is_column, GROUP, OFFSET
        )
        # [chunk, half, r, t, j, u, v]
        values = tl.reshape(values.to(out.dtype.element_ty), [CHUNKS, 2, 8, 4, 4, 2, 2])
        values = tl.permute(values, [1, 2, 0, 4, 5, 3, 6])
    values = tl.reshape(values, [16, CHUNKS * 64])

    place = tl.program_id(0) * 16 + tl.arange(0, 16)
    columns = tl.program_id(1) * CHUNKS * 64 + tl.arange(0, CHUNKS * 64)
    mask = (place < num_rows)[:, None] & (columns < num_chunks * 64)[None, :]
    tl.store(out + place.to(tl.int64)[:, None] * num_chunks * 64 + columns[None, :], values, mask=mask)


@triton.jit
def _scaled_tile(
    values,
    parameters,
    scale,
    tile,
    row,
    column,
    num_rows,
    num_groups,
    mask,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Return the numbers that a tile's `values` are the codes of. row, column: where they are, as few as scales are."""
    if GROUP == 0:
        if OFFSET is not None:
            values -= 8.0
        is_row = tl.program_id(0) * 16 + row < num_rows
        return values * tl.load(scale + tile * 16 + row, mask=is_row, other=0.0)
    else:
        return _scaled(values, parameters, tile, row, column, num_groups, mask, GROUP, OFFSET)


@triton.jit
def _nibbles_of_half(words, HALF: tl.constexpr, table):
    """Return the numbers [..., 128, 2 (u), 2 (v)] of one half of the rows."""
    if table is not None:
        v0 = tl.join(_nibble(words, 8 * HALF, table), _nibble(words, 8 * HALF + 16, table))
        v1 = tl.join(_nibble(words, 8 * HALF + 4, table), _nibble(words, 8 * HALF + 20, table))
    else:
        v0 = tl.join(_nibble(words, 4 * HALF, table), _nibble(words, 4 * HALF + 8, table))
        v1 = tl.join(_nibble(words, 4 * HALF + 16, table), _nibble(words, 4 * HALF + 24, table))
    return tl.join(v0, v1)


@triton.jit
def _nibble(words, SHIFT: tl.constexpr, table):
    code = (words >> SHIFT) & 15
    if table is not None:
        return tl.load(table + code)
    else:
        return code.to(tl.float32)


@triton.jit
def number_of(code, CODE: tl.constexpr):
    """Return what a signed integer, or the bits of an e4m3 (CODE "fp8"), stand for: without a cast, as on any card."""
    if CODE == "fp8":
        bits = code.to(tl.int32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: float32's exponents are so much more
    else:
        return code.to(tl.float32)


def _bytes_of(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.int8) if codes.dtype == FP8 else codes


@triton.jit
def _scaled(values, parameters, tile, row, column, num_groups, mask, GROUP: tl.constexpr, OFFSET: tl.constexpr):
    """Return the numbers that `values` are the codes of. row: in the tile."""
    NUM: tl.constexpr = 2 if OFFSET is None or OFFSET == "eight" else 4
    group = tl.minimum(column // GROUP, num_groups - 1)
    record = ((tile.to(tl.int64) * num_groups + group) * 8 + row % 8) * NUM + row // 8
    scale = tl.load(parameters + record, mask=mask, other=0.0).to(tl.float32)
    if OFFSET == "eight":
        return (values - 8.0) * scale
    elif OFFSET == "zero":
        return (values - tl.load(parameters + record + 2, mask=mask, other=0.0).to(tl.float32)) * scale
    elif OFFSET == "minimum":
        return values * scale - tl.load(parameters + record + 2, mask=mask, other=0.0).to(tl.float32)
    else:
        return values * scale


def look_up(
    ids: torch.Tensor,
    codes: torch.Tensor,
    parameters: torch.Tensor | None,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    group_size: int,
    offset: str | None,
    table: torch.Tensor | None,
) -> torch.Tensor:
    """Return the rows `ids` [T] of W, whose codes are in tiles: [T, k]."""
    num_chunks = codes.shape[1]
    out = torch.empty(len(ids), 64 * num_chunks, dtype=dtype, device=ids.device)
    if len(ids):
        _look_up_kernel[(len(ids), cdiv(num_chunks, 16))](
            ids,
            _bytes_of(codes),
            parameters,
            scale,
            table,
            out,
            num_chunks,
            parameters.shape[1] if parameters is not None else 1,
            CODE=_CODES[codes.dtype],
            GROUP=group_size,
            OFFSET=offset,
            **launch_options(ids.device, num_warps=4),
        )
    return out


@fast_launch
@triton.jit
def _look_up_kernel(
    ids,
    codes,
    parameters,
    scale,
    table,
    out,
    num_chunks,
    num_groups,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    index = tl.load(ids + tl.program_id(0)).to(tl.int64)
    tile = index // 16
    row = index % 16
    half = row // 8
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    mask = column < num_chunks * 64
    chunk = tile * num_chunks + column // 64
    j = column % 64 // 16
    u = column % 16 // 8
    t = column % 8 // 2
    v = column % 2
    thread = 4 * (row % 8) + t
    if CODE == "int4":
        words = tl.load(codes + (chunk * 32 + thread) * 4 + j, mask=mask, other=0)
        if table is not None:
            values = tl.load(table + ((words >> (8 * (half + 2 * u) + 4 * v).to(tl.int32)) & 15))
        else:
            values = ((words >> (4 * (half + 2 * u) + 16 * v).to(tl.int32)) & 15).to(tl.float32)
    else:
        place = (((chunk * 2 + half) * 32 + thread) * 4 + j) * 4 + 2 * u + v
        values = number_of(tl.load(codes + place, mask=mask, other=0), CODE)
    if GROUP == 0:
        if OFFSET is not None:
            values -= 8.0
        values *= tl.load(scale + index)
    else:
        values = _scaled(values, parameters, tile, row, column, num_groups, mask, GROUP, OFFSET)
    tl.store(out + tl.program_id(0).to(tl.int64) * num_chunks * 64 + column, values.to(out.dtype.element_ty), mask=mask)


# ---- inputs ----


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Return whether the device has instructions for numbers of e4m3, tensor cores' too."""
    return card_of(device).capability >= OLDEST_E4M3


def round_inputs(
    x: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    to: str,
    group: int = 0,
    known_scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    is_by_group: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [T, K], float32 scales [T, groups]) of x [T, K] as `quantized.quantize_inputs` does.

    out_dtype: the codes' own type, or one that holds their numbers. norm_weight [K], eps: x is RMS-normed first.
    is_by_group: the scales of a group lie next to each other, at a multiple of 16 bytes.
    """
    num_tokens, k = x.shape
    codes = torch.empty(num_tokens, k, dtype=out_dtype, device=x.device)
    num_groups = k // group if group else 1
    if is_by_group:
        scales = torch.empty(num_groups, cdiv(num_tokens, 4) * 4, dtype=torch.float32, device=x.device).t()[:num_tokens]
    else:
        scales = torch.empty(num_tokens, num_groups, dtype=torch.float32, device=x.device)
    if num_tokens:
        is_native = out_dtype == FP8 and has_e4m3(x.device)
        _launch_rounding(x, codes, scales, to, group, known_scale, norm_weight, eps, is_native=is_native)
    return codes, scales


def rounded_values(
    x: torch.Tensor, *, to: str, group: int = 0, known_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [T, K] rounded as `quantized.rounded_inputs` does, as numbers of x's own type."""
    num_tokens, k = x.shape
    if 0 < group < k and group != next_power_of_2(group):  # by which a kernel cannot cut rows: each is one of its own
        groups = F.pad(x, (0, -k % group)).view(-1, group)
        return rounded_values(groups, to=to, known_scale=known_scale).view(num_tokens, -1)[:, :k].contiguous()
    values = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _launch_rounding(x, values, None, to, group, known_scale)
    return values


def _launch_rounding(
    x: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    to: str,
    group: int,
    known_scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    is_native: bool = False,
) -> None:
    """Write codes and their scales; without `scales` what they stand for."""
    num_tokens, k = x.shape
    block = next_power_of_2(k)
    _round_inputs_kernel[(num_tokens,)](
        x,
        norm_weight,
        known_scale,
        out,
        scales,
        x.stride(0),
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        eps,
        K=k,
        BLOCK=block,
        GROUP=group if group < k else 0,
        IS_FP8=to == "fp8",
        IS_NATIVE=is_native,
        **launch_options(x.device, num_warps=min(max(block // 512, 1), 16)),
    )


@fast_launch
@triton.jit
def _round_inputs_kernel(
    x,
    norm_weight,
    known_scale,
    codes,
    scales,
    x_stride,
    scale_stride,
    group_stride,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    if norm_weight is not None:
        weight = tl.load(norm_weight + n, mask=n < K, other=0.0)
    wait_for_input(PDL)
    values = tl.load(x + row * x_stride + n, mask=n < K, other=0.0).to(tl.float32)
    if norm_weight is not None:
        values *= tl.rsqrt(tl.sum(values * values, axis=0) / K + eps)
        values = values.to(norm_weight.dtype.element_ty) * weight
        values = values.to(x.dtype.element_ty).to(tl.float32)
    LIMIT: tl.constexpr = 448.0 if IS_FP8 else 127.0
    NUM_GROUPS: tl.constexpr = K // GROUP if GROUP else 1
    WIDTH: tl.constexpr = GROUP if GROUP else BLOCK
    groups = tl.reshape(values, [BLOCK // WIDTH, WIDTH])
    if known_scale is not None:
        scale = tl.zeros([BLOCK // WIDTH], tl.float32) + tl.load(known_scale)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-10), LIMIT)
    scaled = groups * tl.div_rn(1.0, scale)[:, None]  # a division each would take longer than reading x
    scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
    if IS_FP8:
        if not IS_NATIVE:
            scaled = _nearest_e4m3(scaled)
    else:
        scaled = _nearest_integer(scaled)
    if scales is None:
        scaled *= scale[:, None]
    rounded = tl.reshape(scaled, [BLOCK])
    tl.store(codes + row * K + n, rounded.to(codes.dtype.element_ty), mask=n < K)
    if scales is not None:
        g = tl.arange(0, BLOCK // WIDTH)
        tl.store(scales + row * scale_stride + g * group_stride, scale, mask=g < NUM_GROUPS)


@triton.jit
def _nearest_integer(x):
    """Round numbers below 2^22 to the nearest integer, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest_e4m3(x):
    """Round numbers up to 448 to the nearest of e4m3, which older cards have no instruction for."""
    # A step is an eighth of the number's power of two; of the smallest numbers 2^-9. Adding 1.5 * 2^23 steps rounds.
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = 12582912.0 * tl.maximum(power * 0.125, 0.001953125)
    return (x + large) - large

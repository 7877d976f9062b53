"""Words of a checkpoint to codes of `kernels.quantized`: values of few bits, the first in the lowest bits."""

import torch
import torch.nn.functional as F

from kernels.quantized import INT4_ZERO, pack_int4
from kernels.weights import ShapeError


def check_words(words: torch.Tensor) -> None:
    """Raise `ShapeError` unless `words` is a matrix of int32."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ShapeError(f"is of {words.dtype} {list(words.shape)}, the format's words are a matrix of torch.int32")


def turned(values: torch.Tensor) -> torch.Tensor:
    """Return a matrix transposed. `ShapeError` if it is none."""
    if values.dim() != 2:
        raise ShapeError(f"has shape {list(values.shape)}, the format's is a matrix")
    return values.t()


def turned_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return scales [outputs, groups] of [groups, outputs]."""
    check_floats(scales)
    return turned(scales)


def check_floats(scales: torch.Tensor) -> None:
    """Raise `ShapeError` unless `scales` are of a dtype of floats that are no codes."""
    is_code = scales.dtype.itemsize == 1 and scales.dtype != torch.float8_e8m0fnu
    if is_code or not scales.is_floating_point():
        raise ShapeError(f"is of {scales.dtype}, the format's scales are floats")


def pack_signed(values: torch.Tensor) -> torch.Tensor:
    """Return int4 codes of a matrix of int8 from -8 to 7."""
    if values.dtype != torch.int8 or values.dim() != 2 or values.shape[1] % 2:
        raise ShapeError(f"is of {values.dtype} {list(values.shape)}, the format's values are a matrix of torch.int8 "
                         "with an even number of columns")  # fmt: skip
    return pack_int4(values + INT4_ZERO)


def unsigned_zeros(zeros: torch.Tensor) -> torch.Tensor:
    """Return the zeros of `pack_signed`'s codes, which are int8 as these were."""
    if zeros.dtype != torch.int8:
        raise ShapeError(f"is of {zeros.dtype}, the format's zeros are of torch.int8")
    return (zeros + INT4_ZERO).to(torch.uint8)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 [rows, 32 words / bits] of int32 [rows, words], whose bits are one row of values."""
    check_words(words)
    if bits == 4:
        pairs = words.contiguous().view(torch.uint8)
        return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    num_values = words.shape[1] * 32 // bits
    if words.shape[1] * 32 % bits:
        raise ShapeError(f"has {words.shape[1]} words a row, which are no whole number of values of {bits} bits")
    # 32 values lie in so many words as they have bits: each of the 32 is always in the same place.
    periods = F.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits)).long() & 0xFFFFFFFF
    values = []
    for start in range(0, 32 * bits, bits):
        word, shift = divmod(start, 32)
        value = periods[:, :, word] >> shift
        if shift + bits > 32:
            value |= periods[:, :, word + 1] << 32 - shift
        values.append((value & (1 << bits) - 1).to(torch.uint8))
    return torch.stack(values, dim=2).flatten(1)[:, :num_values]


def codes_of(words: torch.Tensor, bits: int, *, has_zero: bool) -> torch.Tensor:
    """Return the codes of int32 [rows, words]: int4 of up to 4 bits, int8 of more.

    Values without zeros are moved to where `Format.offset` stands for none of their own: 2^(bits - 1) is subtracted.
    """
    if bits == 4:  # our own layout
        check_words(words)
        return words.contiguous().view(torch.uint8)
    values = unpack(words, bits)
    if bits < 4:
        return pack_int4(values if has_zero else values + (INT4_ZERO - (1 << (bits - 1))))
    return signed(values, bits)


def zeros_of(words: torch.Tensor, bits: int, *, added: int = 0) -> torch.Tensor:
    """Return the zeros of int32 [rows, words], plus `added`, as `codes_of` takes them."""
    values = unpack(words, bits) + added & (1 << bits) - 1
    return values if bits <= 4 else signed(values, bits).half()


def signed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 of uint8 less 2^(bits - 1)."""
    return (values - (1 << (bits - 1))).view(torch.int8)

"""Turn the blocks of GGUF's types of few bits into codes, scales and minima of `kernels.quantized`'s layout.

Blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Codes are the file's own. So are scales that a
block holds as float16; those that it makes of two numbers (K-quants and IQ4_XS: d times 4 to 8 bits) are rounded to
float16, which changes a weight by less than 2^-11 of its scaled code and of its minimum: an eighth of what rounding
it to bfloat16 would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.quantized import TABLES, Format

Array = np.ndarray
Fields = dict[str, Array]
"""Of some rows: codes, scale and maybe minimum, as `kernels.quantized.QuantizedWeight` has them."""

SCALE_DTYPES = {torch.float16: np.float16, torch.float32: np.float32}


@dataclass(frozen=True)
class BlockType:
    """One of GGUF's types: the format that it becomes, and how. unpack: uint8 [blocks, bytes] -> fields [blocks, _]."""

    form: Format
    block_size: int  # numbers in a block
    num_bytes: int
    unpack: Callable[[Array], Fields]


def floats(blocks: Array, start: int) -> Array:
    """Return the float16 at byte `start` of each block, [blocks, 1]."""
    return blocks[:, start : start + 2].view(np.float16)


def rounded_product(d: Array, factors: Array) -> Array:
    """Return d * factors in float16: exact where it is subnormal, since d is a multiple of the smallest of these."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (d.astype(np.float32) * factors.astype(np.float32)).astype(np.float16)


def halves(packed: Array) -> Array:
    """Split bytes [rows, m] into nibbles [rows, 2m]: all low halves, then all high ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def paired_halves(packed: Array) -> Array:
    """Return what `halves` does with two consecutive codes a byte, [rows, m], without unpacking them."""
    pairs = np.ascontiguousarray(packed).view("<u2")
    paired = np.empty((len(pairs), 2, pairs.shape[1]), np.uint8)
    np.bitwise_or(pairs & 0x0F, (pairs >> 4) & 0xF0, out=paired[:, 0], casting="unsafe")
    np.bitwise_or((pairs >> 4) & 0x0F, (pairs >> 8) & 0xF0, out=paired[:, 1], casting="unsafe")
    return paired.reshape(packed.shape)


def paired(codes: Array) -> Array:
    """Return codes [rows, m] two a byte, [rows, m / 2]."""
    packed: Array = codes[:, ::2] | (codes[:, 1::2] << 4)
    return packed


def bits(packed: Array) -> Array:
    """Split bytes [rows, m] into bits [rows, 8, m]: the lowest of all bytes, then the second, ..."""
    return (packed[:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1


def pairs_of_bits(packed: Array) -> Array:
    """Split bytes [blocks, 32 m] into numbers of two bits [blocks, 128 m]: of 32 bytes the lowest, the second, ..."""
    chunks = packed.reshape(len(packed), -1, 1, 32)
    return ((chunks >> np.array([[0], [2], [4], [6]], np.uint8)) & 3).reshape(len(packed), -1)


def six_bits(packed: Array) -> tuple[Array, Array]:
    """Return the eight scales and minima of Q4_K and Q5_K out of their 12 bytes."""
    scale, minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate((scale & 63, (rest & 15) | ((scale >> 2) & 48)), axis=1),
        np.concatenate((minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)), axis=1),
    )


def unpack_q4_0(blocks: Array) -> Fields:
    return {"codes": paired_halves(blocks[:, 2:]), "scale": floats(blocks, 0)}


def unpack_q4_1(blocks: Array) -> Fields:
    return {"codes": paired_halves(blocks[:, 4:]), "scale": floats(blocks, 0), "minimum": -floats(blocks, 2)}


def five_bits(high: Array, low: Array) -> Array:
    """Return codes [blocks, 32] of Q5_0 and Q5_1: a bit each, and the nibbles."""
    codes: Array = halves(low) | (np.unpackbits(high, axis=1, bitorder="little") << 4)
    return codes


def unpack_q5_0(blocks: Array) -> Fields:
    codes = five_bits(blocks[:, 2:6], blocks[:, 6:]).view(np.int8) - np.int8(16)
    return {"codes": codes, "scale": floats(blocks, 0)}


def unpack_q5_1(blocks: Array) -> Fields:
    codes = five_bits(blocks[:, 4:8], blocks[:, 8:]).view(np.int8)
    return {"codes": codes, "scale": floats(blocks, 0), "minimum": -floats(blocks, 2)}


def unpack_q8_0(blocks: Array) -> Fields:
    return {"codes": blocks[:, 2:].view(np.int8), "scale": floats(blocks, 0)}


def unpack_q2_k(blocks: Array) -> Fields:
    scales = blocks[:, :16]
    return {
        "codes": paired(pairs_of_bits(blocks[:, 16:80])),
        "scale": rounded_product(floats(blocks, 80), scales & 15),
        "minimum": rounded_product(floats(blocks, 82), scales >> 4),
    }


def unpack_q3_k(blocks: Array) -> Fields:
    high = bits(blocks[:, :32]).reshape(len(blocks), 256)
    low, top = halves(blocks[:, 96:104]), blocks[:, 104:108]
    scales = low | np.concatenate([((top >> shift) & 3) << 4 for shift in (0, 2, 4, 6)], axis=1)
    # Stored are q + 4 of -4 <= q < 4; a format without minima takes 8 from its codes.
    codes = (pairs_of_bits(blocks[:, 32:96]) | (high << 2)) + np.uint8(4)
    return {"codes": paired(codes), "scale": rounded_product(floats(blocks, 108), scales.view(np.int8) - np.int8(32))}


def unpack_q4_k(blocks: Array) -> Fields:
    scales, minima = six_bits(blocks[:, 4:16])
    return {
        "codes": paired_halves(blocks[:, 16:].reshape(-1, 32)).reshape(len(blocks), 128),
        "scale": rounded_product(floats(blocks, 0), scales),
        "minimum": rounded_product(floats(blocks, 2), minima),
    }


def unpack_q5_k(blocks: Array) -> Fields:
    scales, minima = six_bits(blocks[:, 4:16])
    low = halves(blocks[:, 48:].reshape(-1, 32)).reshape(len(blocks), 256)
    codes = low | (bits(blocks[:, 16:48]) << 4).reshape(len(blocks), 256)
    return {
        "codes": codes.view(np.int8),
        "scale": rounded_product(floats(blocks, 0), scales),
        "minimum": rounded_product(floats(blocks, 2), minima),
    }


def unpack_q6_k(blocks: Array) -> Fields:
    low = halves(blocks[:, :128].reshape(-1, 64)).reshape(len(blocks), 256)
    codes = (low | (pairs_of_bits(blocks[:, 128:192]) << 4)).view(np.int8) - np.int8(32)
    return {"codes": codes, "scale": rounded_product(floats(blocks, 208), blocks[:, 192:208].view(np.int8))}


def unpack_iq4_xs(blocks: Array) -> Fields:
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(len(blocks), 8)
    high = (blocks[:, 2:4].view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scales = (low | (high.astype(np.uint8) << 4)).view(np.int8) - np.int8(32)
    codes = paired_halves(blocks[:, 8:].reshape(-1, 16)).reshape(len(blocks), 128)
    return {"codes": codes, "scale": rounded_product(floats(blocks, 0), scales)}


def unpack_mxfp4(blocks: Array) -> Fields:
    with np.errstate(over="ignore"):  # of 255, which stands for no number
        scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 127)
    return {"codes": paired_halves(blocks[:, 1:]), "scale": scale}


def half(code: str, group_size: int, *, has_minimum: bool = False, table: str | None = None) -> Format:
    """Return a format whose scales are float16."""
    return Format(code, group_size, has_minimum=has_minimum, table=table, scale_dtype=torch.float16)


BLOCKS: Mapping[int, BlockType] = {
    2: BlockType(half("int4", 32), 32, 18, unpack_q4_0),
    3: BlockType(half("int4", 32, has_minimum=True), 32, 20, unpack_q4_1),
    6: BlockType(half("int8", 32), 32, 22, unpack_q5_0),
    7: BlockType(half("int8", 32, has_minimum=True), 32, 24, unpack_q5_1),
    8: BlockType(half("int8", 32), 32, 34, unpack_q8_0),
    10: BlockType(half("int4", 16, has_minimum=True), 256, 84, unpack_q2_k),
    11: BlockType(half("int4", 16), 256, 110, unpack_q3_k),
    12: BlockType(half("int4", 32, has_minimum=True), 256, 144, unpack_q4_k),
    13: BlockType(half("int8", 32, has_minimum=True), 256, 176, unpack_q5_k),
    14: BlockType(half("int8", 16), 256, 210, unpack_q6_k),
    20: BlockType(half("int4", 32, table="iq4"), 32, 18, unpack_q4_0),
    23: BlockType(half("int4", 32, table="iq4"), 256, 136, unpack_iq4_xs),
    39: BlockType(Format("int4", 32, table="fp4"), 32, 17, unpack_mxfp4),
}
"""gguf.GGMLQuantizationType -> what it becomes. Types that are not here are dequantized."""


def unpack_rows(rows: Array, kind: BlockType, target: Format) -> Fields:
    """Return the fields of rows uint8 [rows, bytes] in the format `target`, which holds all that theirs does."""
    fields = kind.unpack(rows.reshape(-1, kind.num_bytes))
    fields = {field: values.reshape(len(rows), -1) for field, values in fields.items()}
    return fields if kind.form == target else widened(fields, kind.form, target)


def common_format(forms: Sequence[Format | None]) -> Format | None:
    """Return a format that holds weights of all `forms` as they are, None if one is not packed."""
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return None
    first = known[0]
    if all(form == first for form in known):
        return first
    tables = {form.table for form in known}
    return replace(
        first,
        code="int4" if len(tables) == 1 and all(form.code == "int4" for form in known) else "int8",
        group_size=min(form.group_size for form in known),
        has_minimum=any(form.has_minimum for form in known),
        table=first.table if len(tables) == 1 else None,
        scale_dtype=torch.float32 if any(form.scale_dtype == torch.float32 for form in known) else torch.float16,
    )


def widened(fields: Fields, form: Format, target: Format) -> Fields:
    """Return fields in another format, which `common_format` chose: the same numbers."""
    codes, scale = fields["codes"], fields["scale"].astype(SCALE_DTYPES[target.scale_dtype], copy=False)
    minimum = fields.get("minimum")
    if form.code == "int4" and target.code == "int8":
        codes = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1)
        if form.table == "fp4":  # has halves
            codes, scale = (2 * np.array(TABLES["fp4"])).astype(np.int8)[codes], scale / 2
        elif form.table is not None:
            codes = np.array(TABLES[form.table], np.int8)[codes]
        else:
            codes = codes.view(np.int8) - np.int8(form.offset)
    if target.has_minimum and minimum is None:
        minimum = scale * scale.dtype.type(form.offset) if target.code == "int4" else np.zeros_like(scale)
    repeats = form.group_size // target.group_size
    groups = {"scale": scale} if minimum is None else {"scale": scale, "minimum": minimum.astype(scale.dtype)}
    return {"codes": codes} | {field: np.repeat(values, repeats, axis=1) for field, values in groups.items()}

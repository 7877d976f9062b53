"""Checkpoints of bitsandbytes: NF4 and FP4 (Dettmers et al. 2023), and int8 (Dettmers et al. 2022)."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization import CHECKED, With
from engine.quantization.bits import check_floats
from engine.quantization.floats import row_scales
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, is_head
from kernels.quantized import TABLES, Format
from kernels.weights import ShapeError

BLOCK = 64  # numbers that share a scale
STATE = "weight.quant_state.bitsandbytes__"  # and the kind; JSON as bytes: the shape, and how scales are rounded


def read_state(state: torch.Tensor | None) -> tuple[int, int, Mapping[str, Any]]:
    """Return rows, columns and the rest of a weight's description. `ShapeError` if its blocks are not of rows."""
    if state is None:
        raise ShapeError(f"needs {STATE}nf4 or fp4, which the checkpoint does not have")
    try:
        found = json.loads(bytes(state.cpu().tolist()))
        rows, columns = found["shape"]
        block = found["blocksize"]
    except (ValueError, LookupError, TypeError):
        raise ShapeError(f"has a description that cannot be read ({STATE}nf4 or fp4)") from None
    if block != BLOCK or columns % BLOCK:
        raise ShapeError(f"has blocks of {block} numbers in rows of {columns}, not whole blocks of {BLOCK} in each row")
    return rows, columns, found


def codes(stored: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
    """Return the codes [rows, columns / 2] of bytes whose high half is the even column; without a state, no codes."""
    if state is None:
        if stored.shape[1:] == (1,):  # of bytes in a row, not of a matrix
            read_state(state)
        return stored
    rows, columns, _ = read_state(state)
    if stored.nbytes * 2 != rows * columns:
        raise ShapeError(f"is of {stored.dtype} {list(stored.shape)}, the format's are {rows * columns // 2} bytes")
    stored = stored.contiguous().view(torch.uint8)  # any dtype may have been named for the bytes
    return ((stored >> 4) | (stored << 4)).view(rows, -1)


def scales(
    absmax: torch.Tensor, state: torch.Tensor | None, of_blocks: torch.Tensor | None, meanings: torch.Tensor | None
) -> torch.Tensor:
    """Return the scales [rows, blocks], which may be rounded to bytes, in blocks with scales of their own."""
    rows, columns, found = read_state(state)
    if absmax.numel() * BLOCK != rows * columns:
        raise ShapeError(f"has {absmax.numel()} scales, the format has one for {BLOCK} of {rows} x {columns} numbers")
    if absmax.dtype == torch.uint8:
        if of_blocks is None or meanings is None or "nested_offset" not in found:
            raise ShapeError("is of bytes, without nested_absmax, nested_quant_map and an offset")
        size, device = int(found.get("nested_blocksize", 256)), absmax.device
        if meanings.shape != (256,) or of_blocks.numel() != -(-absmax.numel() // size):
            raise ShapeError(
                f"has nested_quant_map of {meanings.numel()} and nested_absmax of {of_blocks.numel()} numbers, the "
                f"format's are of 256 and {-(-absmax.numel() // size)}"
            )
        check_floats(of_blocks)
        check_floats(meanings)
        of_each = of_blocks.to(device).repeat_interleave(size)[: len(absmax)]
        absmax = meanings.to(device)[absmax.long()] * of_each + found["nested_offset"]
    check_floats(absmax)
    return absmax.reshape(rows, -1)


def stored_4_bit(kind: str, table: str, largest: float) -> Stored:
    """Return how weights of four bits are stored, whose codes stand for numbers of `TABLES` divided by the largest."""
    state = STATE + kind

    def check_table(meanings: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor(TABLES[table]) / largest
        if meanings.shape != (16,) or not torch.allclose(meanings.float().cpu(), wanted, atol=1e-6):
            raise ShapeError(f"is not {kind.upper()}'s table")
        return meanings

    return Stored(
        Format("int4", BLOCK, table=table, scale_dtype=torch.float16),
        {
            "weight": ("weight", With((state,), codes, optional=True)),
            "weight.absmax": (
                "scale",
                With((state, "weight.nested_absmax", "weight.nested_quant_map"), scales, optional=True),
                lambda absmax: absmax.float() / largest,
            ),
            "weight.quant_map": (CHECKED, check_table),
            state: None,
            "weight.nested_absmax": None,
            "weight.nested_quant_map": None,
        },
    )


FOUR_BITS = {"nf4": stored_4_bit("nf4", "nf4", 1.0), "fp4": stored_4_bit("fp4", "bnb_fp4", 12.0)}
# What the library computes in higher precision, inputs beyond a threshold, it rounds the others for: nothing is, here.
INT8 = Stored(
    Format("int8"),
    {"weight": ("weight",), "SCB": ("scale", lambda largest: row_scales(largest) / 127), "weight_format": None},
)


class BitsAndBytes(ByModule):
    """`load_in_4bit` with NF4 or FP4, or `load_in_8bit`."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        self.excluded = Modules(raw.get("llm_int8_skip_modules"), "llm_int8_skip_modules")
        has_4_bits = entry(raw, "load_in_4bit", bool, False)
        kind = str(raw.get("bnb_4bit_quant_type") or "fp4")
        if has_4_bits and kind not in FOUR_BITS:
            raise ModelError(f"bitsandbytes' 4-bit {kind} is not supported, only {' and '.join(FOUR_BITS)}")
        self.everywhere = FOUR_BITS[kind] if has_4_bits else INT8

    def find(self, names: Collection[str]) -> Stored | None:
        return None if is_head(names) or names in self.excluded else self.everywhere

    def split(self, name: str) -> tuple[str, str]:
        module, found, of_weight = name.partition(".weight.")
        return (module, f"weight.{of_weight}") if found else super().split(name)

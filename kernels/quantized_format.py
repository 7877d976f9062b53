"""How the numbers of weights of few bits are coded, and to what products round their inputs."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.weights import Part, Shard

PANEL_ELEMENTS = 1 << 20  # dequantized at a time
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT4_ZERO = 8  # of 4-bit codes that have neither zeros nor minima nor a table

TABLES = {
    # NormalFloat (Dettmers et al. 2023, QLoRA): quantiles of a normal distribution
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # E2M1, of MXFP4 and NVFP4 (OCP Microscaling Formats 1.0)
    "fp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    # bitsandbytes' FP4, whose own table is these divided by 12
    "bnb_fp4": (
        0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0,
    ),
    # ggml's IQ4_NL and IQ4_XS
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """Say how the numbers of a weight are coded, and to what its products round their inputs."""

    code: str  # "int4": two a byte, the even column in the low half, 0 to 15; "int8": signed; "fp8": e4m3
    group_size: int = 0  # inputs that share a scale; 0: all of a row
    has_zero: bool = False
    has_minimum: bool = False
    table: str | None = None  # of `TABLES`: what the 4-bit codes stand for
    scale_dtype: torch.dtype = torch.float32
    inputs: str | None = None  # "fp8" or "int8": products round their inputs to it
    input_group: int = 0  # inputs that are rounded with one scale; 0: all of a token
    has_input_scale: bool = False  # it is known beforehand, and the same for all tokens
    has_order: bool = False  # groups are of inputs in another order (GPTQ's desc_act)

    def group_size_of(self, k: int) -> int:
        """Return the inputs that share a scale in rows of `k`."""
        return min(self.group_size, k) or k

    def input_unit(self, k: int) -> int:
        """Return how many inputs of rows of `k` must stay together: a scale's, unless it is of all, and a byte's."""
        return self.codes_per_byte if self.group_size_of(k) == k else self.group_size

    @property
    def offset(self) -> int:
        """The number subtracted from integer codes where the file has neither zeros nor minima."""
        return 0 if self.code != "int4" or self.has_zero or self.has_minimum or self.table else INT4_ZERO

    @property
    def code_dtype(self) -> torch.dtype:
        return {"int4": torch.uint8, "int8": torch.int8, "fp8": FP8}[self.code]

    @property
    def codes_per_byte(self) -> int:
        return 2 if self.code == "int4" else 1


class Coded(Protocol):
    """Stand for a `kernels.quantized.QuantizedWeight` in modules that it imports."""

    parts: tuple[Part, ...]
    n: int
    k: int
    num_inputs: int
    input_shard: Shard
    dtype: torch.dtype
    form: Format
    fields: dict[str, torch.Tensor]


def ordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the inputs x [T, k] that stand at each place of `order` [places]; k in it stands for a zero."""
    return (x if len(order) == x.shape[1] else F.pad(x, (0, 1)))[:, order]


def unordered(rows: torch.Tensor, order: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """Return rows [n, places] of weights in the order of their inputs, [n, num_inputs]: see `ordered`."""
    found = rows.new_empty(len(rows), num_inputs + (len(order) > num_inputs))
    return found.index_copy_(1, order, rows)[:, :num_inputs]


def unpack_codes(form: Format, codes: torch.Tensor) -> torch.Tensor:
    """Return one code an element, [rows, k]."""
    if form.code != "int4":
        return codes
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Return uint8 [rows, k / 2] of values [rows, k] from 0 to 15: the even column in the low half of a byte."""
    values = values.to(torch.uint8)
    return values[:, ::2] | (values[:, 1::2] << 4)

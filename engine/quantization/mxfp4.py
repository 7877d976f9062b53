"""Checkpoints of gpt-oss, whose experts are MXFP4 (OCP Microscaling Formats 1.0)."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.quantization.floats import MX_GROUP, power_of_two
from engine.quantization.packed import ByModule, Stored
from kernels.quantized import Format

EXPERTS = ".experts"


def bytes_of_rows(blocks: torch.Tensor) -> torch.Tensor:
    """Return codes [rows, inputs / 2] of blocks [rows, inputs / 32, 16]: both have the even input in the low half."""
    return blocks.flatten(-2)


class MXFP4(ByModule):
    """Experts in blocks of 32 inputs with a power of two each; all else is plain."""

    def __init__(self, raw: Mapping[str, Any]) -> None:  # noqa: ARG002 - the files say which modules they are
        super().__init__()
        form = Format("int4", MX_GROUP, table="fp4", scale_dtype=torch.bfloat16)
        self.experts = Stored(form, {"blocks": ("codes", bytes_of_rows), "scales": ("scale", power_of_two)})

    def find(self, names: Collection[str]) -> Stored | None:
        return self.experts if any(f"{name}.".find(f"{EXPERTS}.") >= 0 for name in names) else None

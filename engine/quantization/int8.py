"""Checkpoints of 8-bit integers as they are named after SGLang's kernels: `w8a8_int8` and `blockwise_int8`."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.quantization import With
from engine.quantization.floats import NOT_OF_WEIGHTS, row_scales
from engine.quantization.fp8 import SCALES, checked_block
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, is_head
from kernels.quantized import Format

BLOCK = [128, 128]


class W8A8Int8(ByModule):
    """Scales of rows, inputs rounded by token."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        self.excluded = Modules(raw.get("ignore") or raw.get("modules_to_not_convert"), "ignore")
        self.everywhere = self.stored_everywhere(raw)

    def stored_everywhere(self, raw: Mapping[str, Any]) -> Stored:  # noqa: ARG002
        """Return how modules are stored."""
        form = Format("int8", inputs="int8")
        return Stored(form, {"weight": ("weight",), "weight_scale": ("scale", row_scales), **NOT_OF_WEIGHTS})

    def find(self, names: Collection[str]) -> Stored | None:
        return None if is_head(names) or names in self.excluded else self.everywhere


class BlockwiseInt8(W8A8Int8):
    """Scales of blocks (`weight_block_size`). Inputs are not rounded, which is more exact."""

    def stored_everywhere(self, raw: Mapping[str, Any]) -> Stored:
        block = checked_block(raw.get("weight_block_size") or BLOCK, "weight_block_size")
        rows, columns = block or (1, 0)

        def of_blocks(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return row_scales(scale, rows)[: len(weight)]

        scales = dict.fromkeys(SCALES, ("scale", With(("weight",), of_blocks)))
        return Stored(Format("int8", columns), {"weight": ("weight",), **scales, **NOT_OF_WEIGHTS})

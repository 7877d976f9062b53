"""AWQ checkpoints (Lin et al. 2023): 4 bits with zeros, words along the outputs."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization.bits import check_words
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, is_head
from kernels.quantized import Format, pack_int4

# The column of eight that each nibble of a word holds, lowest first.
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Return uint8 [rows, 8 columns] of int32 [rows, columns], in the order of the outputs."""
    check_words(words)
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(COLUMNS)] = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (words[:, :, None] >> shifts.to(words.device)) & 15
    return nibbles.to(torch.uint8).flatten(1)


def stored_awq(group_size: int) -> Stored:
    """Return how AWQ stores a module. group_size: 0 or less: all of a row."""
    return Stored(
        Format("int4", max(group_size, 0), has_zero=True, scale_dtype=torch.float16),
        {
            "qweight": ("codes", lambda words: pack_int4(unpack_words(words).t())),
            "qzeros": ("zero", lambda words: unpack_words(words).t()),
            "scales": ("scale", torch.t),
        },
    )


class AWQ(ByModule):
    """`version` "gemm"."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for other kinds of AWQ."""
        super().__init__()
        bits, version = raw.get("bits", raw.get("w_bit", 4)), str(raw.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(f"AWQ of {bits} bits, version {version!r}, is not supported: only 4 bits, version 'gemm'")
        self.excluded = Modules(raw.get("modules_to_not_convert"), "modules_to_not_convert")
        self.everywhere = stored_awq(entry(raw, "group_size", int, entry(raw, "q_group_size", int, 128)))

    def find(self, names: Collection[str]) -> Stored | None:
        return None if is_head(names) or names in self.excluded else self.everywhere

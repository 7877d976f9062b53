"""AWQ checkpoints (Lin et al. 2023): 4 bits with zeros, words along the outputs."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization.bits import check_words, turned_scales
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, is_head
from kernels.quantized import Format
from kernels.weights import ShapeError


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Return uint8 [8 columns, rows] of int32 [rows, columns], in the order of the outputs."""
    stored = _bytes(words)
    return _outputs(stored & 15, stored >> 4)


def pack_inputs(words: torch.Tensor) -> torch.Tensor:
    """Return the codes [8 columns, rows / 2] of int32 [rows, columns]: two rows a byte, none of them unpacked."""
    check_words(words)
    if len(words) % 2:
        raise ShapeError(f"has {len(words)} inputs, which must be an even number")
    stored = _bytes(words)
    even, odd = stored[::2], stored[1::2]
    return _outputs((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0))


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """Return uint8 [rows, columns, 4] of int32 [rows, columns]."""
    check_words(words)
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)


def _outputs(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return [outputs, rows] of the low and the high halves of words' bytes, [rows, words, 4] each.

    The low ones are of the outputs 0, 4, 1 and 5 of eight, the high ones of 2, 6, 3 and 7.
    """
    num_rows, num_words = low.shape[:2]
    halves = torch.stack((low, high), dim=2).view(num_rows, num_words, 2, 2, 2)  # these add 2, 1 and 4 to an output
    return halves.permute(1, 4, 2, 3, 0).flatten(0, 3)


def stored_awq(group_size: int) -> Stored:
    """Return how AWQ stores a module. group_size: 0 or less: all of a row."""
    return Stored(
        Format("int4", max(group_size, 0), has_zero=True, scale_dtype=torch.float16),
        {
            "qweight": ("codes", pack_inputs),
            "qzeros": ("zero", unpack_words),
            "scales": ("scale", turned_scales),
        },
    )


class AWQ(ByModule):
    """`version` "gemm"."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for other kinds of AWQ."""
        super().__init__()
        bits = entry(raw, "bits", int, entry(raw, "w_bit", int, 4))
        version = next((raw[name] for name in ("version", "checkpoint_format", "format") if raw.get(name)), "gemm")
        version = str(version).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(f"AWQ of {bits} bits, version {version!r}, is not supported: only 4 bits, version 'gemm'")
        self.excluded = Modules(raw.get("modules_to_not_convert"), "modules_to_not_convert")
        self.everywhere = stored_awq(entry(raw, "group_size", int, entry(raw, "q_group_size", int, 128)))

    def find(self, names: Collection[str]) -> Stored | None:
        return None if is_head(names) or names in self.excluded else self.everywhere

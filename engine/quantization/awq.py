"""AWQ checkpoints (Lin et al. 2023): 4 bits with zeros, words along the outputs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization import DENSE, Quantization, Scheme, Transform
from engine.quantization.packed import Packed
from kernels.quantized import Format, pack_int4

# The column of eight that each nibble of a word holds, lowest first.
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Return uint8 [rows, 8 columns] of int32 [rows, columns], in the order of the outputs."""
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(COLUMNS)] = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (words[:, :, None] >> shifts.to(words.device)) & 15
    return nibbles.to(torch.uint8).flatten(1)


CONVERSIONS: dict[str, tuple[str, Transform]] = {
    "qweight": ("codes", lambda words: pack_int4(unpack_words(words).t())),
    "qzeros": ("zero", lambda words: unpack_words(words).t()),
    "scales": ("scale", torch.t),
}


class AWQ(Quantization):
    """`version` "gemm"."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for other kinds of AWQ."""
        bits, version = raw.get("bits", raw.get("w_bit", 4)), str(raw.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(f"AWQ of {bits} bits, version {version!r}, is not supported: only 4 bits, version 'gemm'")
        group_size = raw.get("group_size", raw.get("q_group_size", 128))
        self.excluded = tuple(raw.get("modules_to_not_convert") or ())
        form = Format("int4", max(group_size, 0), has_zero=True, scale_dtype=torch.float16)
        self.scheme = Packed(form)

    def scheme_of(self, module: str) -> Scheme:
        if module == "lm_head" or any(name in module for name in self.excluded):
            return DENSE
        return self.scheme

    def converted(self, name: str) -> Iterable[tuple[str, Sequence[Transform]]]:
        module, _, leaf = name.rpartition(".")
        if leaf in CONVERSIONS:
            field, transform = CONVERSIONS[leaf]
            yield f"{module}.{field}", (transform,)
        else:
            yield name, ()

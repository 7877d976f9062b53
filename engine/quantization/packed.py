"""Weights that a checkpoint holds in few bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.quantized import Format, QuantizedWeight
from kernels.weights import Part, Shard


@dataclass(frozen=True)
class Packed:
    """Codes and scales. names: (field of `QuantizedWeight`, what the checkpoint calls it)."""

    form: Format
    names: tuple[tuple[str, str], ...] = ()

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> QuantizedWeight:
        return QuantizedWeight(parts, k, dtype, self.form, input_shard, dict(self.names))

"""Weights that are not quantized."""

from collections.abc import Sequence

import torch

from kernels.dense import DenseWeight
from kernels.weights import Part, Shard


class Dense:
    """Numbers of the model's own dtype."""

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> DenseWeight:
        return DenseWeight(parts, k, dtype, input_shard)

    def input_unit(self, num_inputs: int) -> int:  # noqa: ARG002
        return 1


DENSE = Dense()

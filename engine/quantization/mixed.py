"""Products that are made as one, whose parts a checkpoint stores differently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.quantization import Scheme
from kernels.mixed import MixedWeight
from kernels.weights import Part, Shard, Weight


@dataclass(frozen=True)
class Mixed:
    """A scheme for each part."""

    schemes: tuple[Scheme, ...]

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> Weight:
        pairs = zip(self.schemes, parts, strict=True)
        return MixedWeight([scheme.weight([part], k, input_shard, dtype) for scheme, part in pairs])

    def input_unit(self, num_inputs: int) -> int:
        return math.lcm(*(scheme.input_unit(num_inputs) for scheme in self.schemes))


def scheme_of_parts(schemes: Sequence[Scheme]) -> Scheme:
    """Return the scheme of a weight whose parts have `schemes`."""
    return schemes[0] if all(scheme == schemes[0] for scheme in schemes) else Mixed(tuple(schemes))

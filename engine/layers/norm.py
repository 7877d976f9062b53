"""Root mean square layer normalization (Zhang and Sennrich 2019)."""

from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, meta_weight
from kernels.elementwise import rms_norm


class RMSNorm(Layer):
    """Every rank holds all of it. Layers that take a norm as an argument fuse it into their product."""

    weight_names: ClassVar = ("weight",)

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        self.eps = eps
        self.weight = meta_weight(size, dtype=layers.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

"""Normalizations of hidden states. Every rank holds all of their weights."""

from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, meta_weight
from kernels.elementwise import rms_norm


class RMSNorm(Layer):
    """Root mean square layer normalization (Zhang and Sennrich 2019); a `kernels.weights.Norm` that products fuse."""

    weight_names: ClassVar = ("weight",)
    is_rms: ClassVar = True

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        self.eps = eps
        self.weight = meta_weight(size, dtype=layers.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        self.weight.fill_(1.0)


class OffsetRMSNorm(RMSNorm):
    """An RMS norm that scales by 1 + weight, in float32 and rounded last (Gemma, Qwen3-Next).

    The 1 is added when the weight is loaded; bf16 would lose bits of the sum, so it is kept in float32.
    """

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        super().__init__(size, eps, layers)
        self.weight = meta_weight(size, dtype=torch.float32)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        target, source = super().place_weight(name, loaded, part)
        return target, 1 + source.float()

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        return super().weight_part(name, part) - 1

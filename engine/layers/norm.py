"""Normalizations of hidden states. Every rank holds all of their weights."""

from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, meta_weight
from kernels.elementwise import layer_norm, rms_norm


class HiddenNorm(Layer):
    """A normalization of hidden states [T, size]: a `kernels.weights.Norm`, which products fuse where it `is_rms`."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    is_rms: ClassVar = False

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        self.eps = eps
        self.weight = meta_weight(size, dtype=layers.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        for name, weight in self.weights():
            weight.fill_(float(name == "weight"))


class RMSNorm(HiddenNorm):
    """Root mean square layer normalization (Zhang and Sennrich 2019)."""

    is_rms: ClassVar = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Float32RMSNorm(RMSNorm):
    """An RMS norm whose product with the weight is made in float32 and rounded last (OLMo 2, Gemma 4)."""

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        super().__init__(size, eps, layers)
        self.weight = meta_weight(size, dtype=torch.float32)


class OffsetRMSNorm(Float32RMSNorm):
    """An RMS norm that scales by 1 + weight, in float32 and rounded last (Gemma 1 to 3, Qwen3-Next).

    The 1 is added when the weight is loaded; bf16 would lose bits of the sum, so it is kept in float32.
    """

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        target, source = super().place_weight(name, loaded, part)
        return target, 1 + source.float()

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        return super().weight_part(name, part) - 1


class UnitRMSNorm(RMSNorm):
    """An RMS norm without a weight: a checkpoint has nothing for it. Ready after `materialize`."""

    weight_names: ClassVar = ()

    def materialize(self, device: torch.device) -> None:
        self.weight = torch.ones(self.weight.shape, dtype=self.weight.dtype, device=device)


class LayerNorm(HiddenNorm):
    """Layer normalization (Ba et al. 2016): zero mean and unit variance, then a weight and a bias."""

    weight_names: ClassVar = ("weight", "bias")

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        super().__init__(size, eps, layers)
        self.bias: torch.Tensor | None = meta_weight(size, dtype=layers.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class BiaslessLayerNorm(LayerNorm):
    """A layer normalization with a weight alone (Cohere)."""

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        super().__init__(size, eps, layers)
        self.bias = None


class BareLayerNorm(HiddenNorm):
    """A layer normalization with neither weight nor bias (OLMo 1)."""

    weight_names: ClassVar = ()

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:  # noqa: ARG002 - any size, without weights
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, None, None, self.eps)


class OffsetLayerNorm(LayerNorm):
    """A layer normalization that scales by 1 + weight, kept in float32 as that of `OffsetRMSNorm` is (Nemotron)."""

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:
        super().__init__(size, eps, layers)
        self.weight = meta_weight(size, dtype=torch.float32)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        target, source = super().place_weight(name, loaded, part)
        return target, 1 + source.float() if name == "weight" else source

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        weight = super().weight_part(name, part)
        return weight - 1 if name == "weight" else weight


class NoNorm(HiddenNorm):
    """Leaves hidden states as they are, where other models have a norm."""

    weight_names: ClassVar = ()

    def __init__(self, size: int, eps: float, layers: LayerConfig) -> None:  # noqa: ARG002 - any size, without weights
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

"""RMS norms over all heads of queries, and over all heads of keys (OLMo 2), which ranks compute together."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, meta_weight
from kernels.elementwise import rms_norm
from kernels.weights import Part, match_shard


class AllHeadsNorm(Layer):
    """Hold a rank's share of both norms. Products with the weight are made in float32 and rounded last."""

    weight_names: ClassVar = ("weight",)
    part_names = ("q_norm", "k_norm")

    def __init__(self, parts: Sequence[Part], eps: float, layers: LayerConfig) -> None:
        """parts: those of the projection that make queries and keys."""
        self.parts, self.eps, self.comm = tuple(parts), eps, layers.comm
        self.sizes = [part.num_rows for part in parts]
        self.weight = meta_weight(sum(self.sizes), dtype=torch.float32)
        # All ranks together have so many values; with more ranks than KV heads some are counted several times.
        self.num_values = torch.tensor([size * layers.comm.size for size in self.sizes], dtype=torch.float32)

    def __call__(self, qk: torch.Tensor) -> None:
        """Normalize queries and keys [T, (H + Hkv) D] of this rank, in place."""
        weights, parts = self.weight.split(self.sizes), qk.split(self.sizes, dim=-1)
        if self.comm.size == 1:
            for part, weight in zip(parts, weights, strict=True):
                part.copy_(rms_norm(part, weight, self.eps))
            return
        floats = [part.float() for part in parts]
        squares = self.comm.all_reduce(torch.stack([part.square().sum(-1) for part in floats], dim=-1))  # [T, 2]
        scales = (squares / self.num_values + self.eps).rsqrt().split(1, dim=-1)
        for part, values, scale, weight in zip(parts, floats, scales, weights, strict=True):
            part.copy_(values * scale * weight)

    def materialize(self, device: torch.device) -> None:
        super().materialize(device)
        self.num_values = self.num_values.to(device)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return match_shard(self.weight_part(name, part), loaded, 0, self.parts[part].shard)

    def weight_part(self, name: str, part: int) -> torch.Tensor:  # noqa: ARG002 - there is one weight
        start = sum(self.sizes[:part])
        return self.weight[start : start + self.sizes[part]]

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        self.weight.fill_(1.0)

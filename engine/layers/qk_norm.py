"""Norms of queries and keys before the rotation that the rotation's kernel does not fuse."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, meta_weight
from kernels.elementwise import layer_norm_heads_, rms_norm
from kernels.weights import Part, ShapeError, match_shard


class AllHeadsNorm(Layer):
    """RMS norms over all heads of queries, and over all heads of keys (OLMo 2), which ranks compute together.

    Products with the weight are made in float32 and rounded last.
    """

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


class EachHeadNorm(Layer):
    """A layer norm without bias of each query and key head, by a weight of its own (Command R+, StableLM 2).

    In a checkpoint's names after all rules, heads are numbered: `q_norm.0`, `q_norm.1`, ..., `k_norm.0`, ...
    """

    weight_names: ClassVar = ("weight",)

    def __init__(self, parts: Sequence[Part], head_dim: int, eps: float, layers: LayerConfig) -> None:
        """parts: those of the projection that make queries and keys."""
        self.eps, self.head_dim = eps, head_dim
        self.sizes = [part.num_rows for part in parts]
        self.weight = meta_weight(sum(self.sizes) // head_dim, head_dim, dtype=layers.dtype)
        rows: dict[str, int | None] = {}  # of each head of the model: where in the weight it is, None on another rank
        start = 0
        for name, part in zip(("q_norm", "k_norm"), parts, strict=True):
            num_heads = part.num_rows // head_dim
            for head in range(num_heads * part.shard.count):
                is_here = head // num_heads == part.shard.index
                rows[f"{name}.{head}"] = start + head % num_heads if is_here else None
            start += num_heads
        self.part_names, self.rows = tuple(rows), tuple(rows.values())

    def __call__(self, qk: torch.Tensor) -> None:
        """Normalize queries and keys [T, (H + Hkv) D] of this rank, in place."""
        layer_norm_heads_(qk, self.weight, self.eps)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        if loaded.numel() != self.head_dim:
            raise ShapeError(f"has {loaded.numel()} elements a head, the model wants {self.head_dim}")
        target = self.weight_part(name, part)
        return target, loaded.flatten()[: len(target)]

    def weight_part(self, name: str, part: int) -> torch.Tensor:  # noqa: ARG002 - there is one weight
        row = self.rows[part]
        return self.weight[0, :0] if row is None else self.weight[row]

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        self.weight.fill_(1.0)

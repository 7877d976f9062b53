"""Matrix products of a transformer block, split over ranks as in Megatron-LM (Shoeybi et al. 2019).

Column parallel: every rank computes some of the outputs. Row parallel: every rank holds some of the inputs and adds
its share to the sum.
"""

from typing import ClassVar

import torch

from engine.errors import ModelError
from engine.layers.layer import Layer, LayerConfig, Shard, match_shard, meta_weight
from engine.layers.norm import RMSNorm
from kernels.gemm import linear, linear_add, norm_linear, norm_linear_act, pack

# Hugging Face's name -> the kernels'
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class ColumnParallelLinear(Layer):
    """norm, then product. The weight [N, K] is a stack of parts; part i holds `shards[i]` of a checkpoint's tensor.

    `part_sizes` are this rank's.
    """

    weight_names: ClassVar = ("weight", "bias")

    def __init__(
        self, input_size: int, part_sizes: list[int], shards: list[Shard], bias: bool, layers: LayerConfig
    ) -> None:
        self.part_sizes = part_sizes
        self.shards = shards
        self.weight = meta_weight(sum(part_sizes), input_size, dtype=layers.dtype)
        self.bias = meta_weight(sum(part_sizes), dtype=layers.dtype) if bias else None

    def __call__(self, h: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return norm_linear(h, norm.weight, norm.eps, self.weight, self.bias)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return match_shard(self.weight_part(name, part), loaded, 0, self.shards[part])

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        return super().weight_part(name, part).narrow(0, sum(self.part_sizes[:part]), self.part_sizes[part])

    def pack(self) -> None:
        self.weight = pack(self.weight)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several products of the same input, each split evenly."""

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool, layers: LayerConfig) -> None:
        part_sizes = [layers.split(size, "output size") for size in output_sizes]
        super().__init__(input_size, part_sizes, [layers.shard] * len(output_sizes), bias, layers)

    def gated(self, h: torch.Tensor, norm: RMSNorm, act: str) -> torch.Tensor:
        """act(gate) * up of two products, gate and up: [T, 2N] is not kept."""
        return norm_linear_act(h, norm.weight, norm.eps, self.weight, self.bias, act)


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values, split by heads.

    `num_heads` and `num_kv_heads` are this rank's.
    """

    def __init__(
        self, input_size: int, head_dim: int, num_heads: int, num_kv_heads: int, bias: bool, layers: LayerConfig
    ) -> None:
        kv_shard = layers.kv_shard(num_kv_heads)
        self.num_heads = layers.split(num_heads, "num_attention_heads")
        self.num_kv_heads = layers.num_kv_heads(num_kv_heads)
        kv_size = self.num_kv_heads * head_dim
        super().__init__(
            input_size, [self.num_heads * head_dim, kv_size, kv_size], [layers.shard, kv_shard, kv_shard], bias, layers
        )


class RowParallelLinear(Layer):
    """The product that ends a residual branch: h + x W^T + b, which may be written into h.

    Of several ranks the first adds h and b to its product, before the sum over ranks: that costs no pass of its own.
    """

    weight_names: ClassVar = ("weight", "bias")

    def __init__(self, input_size: int, output_size: int, bias: bool, layers: LayerConfig) -> None:
        self.shard, self.comm = layers.shard, layers.comm
        self.weight = meta_weight(output_size, layers.split(input_size, "input size"), dtype=layers.dtype)
        self.bias = meta_weight(output_size, dtype=layers.dtype) if bias else None

    def __call__(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        partial = linear_add(x, self.weight, h, self.bias) if self.comm.rank == 0 else linear(x, self.weight)
        return self.comm.all_reduce(partial)

    def add_to(self, h: torch.Tensor, x: torch.Tensor) -> None:
        """The same, written into h."""
        result = self(x, h)
        if result.data_ptr() != h.data_ptr():
            h.copy_(result)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "bias":  # every rank holds all of it
            return super().place_weight(name, loaded, part)
        return match_shard(self.weight, loaded, 1, self.shard)

    def pack(self) -> None:
        self.weight = pack(self.weight)


def activation(hidden_act: str) -> str:
    """The name kernels give to config.json's `hidden_act`."""
    if hidden_act not in ACTIVATIONS:
        raise ModelError(f"hidden_act {hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[hidden_act]

"""Matrix products of a transformer block, split over ranks as in Megatron-LM (Shoeybi et al. 2019).

Column parallel: every rank computes some of the outputs. Row parallel: every rank holds some of the inputs, and the
products of all ranks are summed (`engine.layers.block.sum_over_ranks`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from engine.errors import ModelError
from engine.layers.layer import Layer, LayerConfig, meta_weight
from engine.quantization import Scheme
from engine.quantization.mixed import scheme_of_parts
from kernels.weights import WHOLE, Part, ShapeError, Shard, Weight, match_shard

# Hugging Face's name -> the kernels'
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


class Linear(Layer):
    """A weight, a bias if the model has one, and the names of the checkpoint's tensors that are stacked in them."""

    schemes: Sequence[Scheme] = ()  # the format of each part; of a tied head the embedding says it

    def __init__(
        self,
        part_names: Sequence[str],
        parts: Sequence[Part],
        input_size: int,
        layers: LayerConfig,
        *,
        bias: bool = False,
        input_shard: Shard = WHOLE,
    ) -> None:
        """part_names: () if the layer's own name is the only one. input_size: on this rank."""
        self.part_names, self.dtype = tuple(part_names), layers.dtype
        try:
            self.schemes = layers.schemes_of(self.part_names)
            scheme = scheme_of_parts(self.schemes)
            self.weight: Weight = scheme.weight(parts, input_size, input_shard, layers.dtype)
        except ShapeError as error:
            raise ModelError(f"{layers.path} {error}") from None
        self.bias = meta_weight(self.weight.n, dtype=layers.dtype) if bias else None

    def __call__(self, x: torch.Tensor, **fused: Any) -> torch.Tensor:
        """Return x W^T + bias, and what `Weight.product`'s keywords ask for around it."""
        return self.weight.product(x, bias=self.bias, **fused)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weight.tensors()
        if self.bias is not None:
            yield "bias", self.bias

    def names_of(self, part: int) -> list[str]:
        return self.weight.names_of(part) + (["bias"] if self.bias is not None else [])

    def materialize(self, device: torch.device) -> None:
        self.weight.materialize(device)
        if self.bias is not None:
            self.bias = torch.empty_like(self.bias, device=device)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "bias":  # of inputs that are split, every rank holds all of it
            return match_shard(self.weight_part(name, part), loaded, 0, self.weight.parts[part].shard)
        return self.weight.place(name, loaded, part)

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        if name == "bias":
            assert self.bias is not None
            return self.bias[self.weight.row_slice(part)]
        return self.weight.rows_of(part)

    def move_to(self, device: torch.device) -> None:
        self.weight.transform(lambda tensor: tensor.to(device))
        if self.bias is not None:
            self.bias = self.bias.to(device)

    def expect(self, schemes: Sequence[Scheme]) -> None:
        """Change the formats of the parts, before anything is loaded. `ShapeError` if one has no such shape."""
        weight, self.schemes = self.weight, list(schemes)
        self.weight = scheme_of_parts(self.schemes).weight(weight.parts, weight.k, weight.input_shard, self.dtype)

    def pack(self) -> None:
        self.weight = self.weight.pack()

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_random(generator)
        if self.bias is not None:
            self.bias.normal_(0, 0.02, generator=generator)


def merged_column_parallel(
    part_names: Sequence[str], output_sizes: Sequence[int], input_size: int, layers: LayerConfig, *, bias: bool = False
) -> Linear:
    """Return several products of one input as one, each split evenly over the ranks."""
    parts = [Part(layers.split(size, "output size"), layers.shard) for size in output_sizes]
    return Linear(part_names, parts, input_size, layers, bias=bias)


def qkv_parallel(
    input_size: int, head_dim: int, num_heads: int, num_kv_heads: int, layers: LayerConfig, *, bias: bool = False
) -> Linear:
    """Return the product that makes queries, keys and values, split by heads. The numbers of heads are the model's.

    num_kv_heads: 0 if it makes queries alone.
    """
    q = Part(layers.split(num_heads, "num_attention_heads") * head_dim, layers.shard)
    if not num_kv_heads:
        return Linear(("q_proj",), [q], input_size, layers, bias=bias)
    kv = Part(layers.num_kv_heads(num_kv_heads) * head_dim, layers.kv_shard(num_kv_heads))
    return Linear(("q_proj", "k_proj", "v_proj"), [q, kv, kv], input_size, layers, bias=bias)


def row_parallel(input_size: int, output_size: int, layers: LayerConfig, *, bias: bool = False) -> Linear:
    """Return a product whose inputs are split over the ranks."""
    num_inputs = layers.split(input_size, "input size")
    return Linear((), [Part(output_size)], num_inputs, layers, bias=bias, input_shard=layers.shard)


def activation(hidden_act: str) -> str:
    """Return the kernels' name for config.json's `hidden_act`. `ModelError` if there is no such kernel."""
    if hidden_act not in ACTIVATIONS:
        raise ModelError(f"hidden_act {hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[hidden_act]

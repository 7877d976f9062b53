"""The base of every layer.

Layers are plain objects rather than `torch.nn.Module`s: a forward on a small model is a few hundred attribute
reads, and a module's weights and children are found through `__getattr__`, ten times slower than a plain attribute.
Nothing of a module is needed here: weights are never trained, and they get their device once, when loaded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import torch

from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.quantization import Quantization, Scheme
from kernels.launch import cdiv
from kernels.weights import Shard, match_shard

ALIGNED = 16  # numbers, whose multiples GPUs read fast


@dataclass(frozen=True)
class LayerConfig:
    """Hold what all layers of one rank have in common, and the path of the layer that is being made.

    Passed down, so that model files need not know of ranks or formats.
    """

    dtype: torch.dtype
    attention_backend: str = "torch"
    kv_dtype: torch.dtype | None = None  # of cached keys and values; None: `dtype`
    has_window_slots: bool = False  # layers that see a window keep their tokens in a pool of their own
    comm: Communicator = field(default_factory=Communicator)
    quantization: Quantization = field(default_factory=Quantization)
    path: str = ""
    block_index: int = 0
    ep_size: int = 1  # groups of ranks that share out a layer's experts; ranks of a group split each of theirs

    def within(self, name: str) -> "LayerConfig":
        """Return the configuration of the child `name`."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def schemes_of(self, part_names: Sequence[str]) -> list[Scheme]:
        """Return the format of each part of the layer at `path`.

        part_names: of the modules that are merged in it; (): it is one of its own.
        """
        parent = self.path.rpartition(".")[0]
        modules = [f"{parent}.{name}" if parent else name for name in part_names] or [self.path]
        return [self.quantization.scheme_of(module) for module in modules]

    @property
    def shard(self) -> Shard:
        return Shard(self.comm.rank, self.comm.size)

    @property
    def width_shard(self) -> Shard:
        """Return this rank's slice of each of its experts."""
        num_slices = self.comm.size // self.ep_size
        return Shard(self.comm.rank % num_slices, num_slices)

    def held_experts(self, num_experts: int) -> range:
        """Return which of a layer's experts this rank has. `ModelError` if they cannot be shared out evenly."""
        if num_experts % self.ep_size:
            raise ModelError(f"{num_experts} experts cannot be shared out over --ep-size {self.ep_size}")
        count = num_experts // self.ep_size
        first = self.comm.rank * self.ep_size // self.comm.size * count
        return range(first, first + count)

    def kv_shard(self, num_kv_heads: int) -> Shard:
        """Return this rank's slice of keys and values. With more ranks than KV heads, several ranks hold one head."""
        size = self.comm.size
        if size > num_kv_heads and size % num_kv_heads == 0:
            return Shard(self.comm.rank * num_kv_heads // size, num_kv_heads)
        return self.shard

    def num_kv_heads(self, of_all: int) -> int:
        """Return this rank's share of `of_all` KV heads. `ModelError` if they cannot be split."""
        return size_of(self.kv_shard(of_all), of_all, "num_key_value_heads")

    def split(self, size: int, what: str) -> int:
        """Return this rank's share of `size`. `ModelError`, which names `what`, if it cannot be split."""
        return size_of(self.shard, size, what)


def size_of(shard: Shard, size: int, what: str) -> int:
    """Return the length of a shard of `size`. `ModelError` if `size` does not divide."""
    if size % shard.count:
        raise ModelError(f"{what} is {size}, which cannot be split over {shard.count} ranks")
    return size // shard.count


def padded_split(shard: Shard, size: int, unit: int) -> tuple[int, Shard]:
    """Return a shard's length of `size`, and the shard: of whole units, if need be with zeros at the end.

    unit: what must stay together.
    """
    if size % (shard.count * unit) == 0:
        return size // shard.count, shard
    unit = math.lcm(unit, ALIGNED)
    length = cdiv(cdiv(size, shard.count), unit) * unit
    return length, replace(shard, extent=Fraction(size, length * shard.count))


class Layer:
    """A part of a model. Its attributes that are layers, or lists of layers, are its children.

    Weights start on the meta device, are put on a device by `materialize` and filled through `place_weight`.
    """

    weight_names: ClassVar[tuple[str, ...]] = ()
    part_names: tuple[str, ...] = ()
    """The names in a checkpoint of the tensors that stand row on row in each weight; (): the layer's own."""
    stack: range | None = None
    """Which weights of a kind (experts) are stacked; None: it is one weight."""
    num_stackable: int = 0
    """Number of weights of that kind on all ranks."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this layer's own tensors, not its children's; an absent bias is None and not listed."""
        for name in self.weight_names:
            if (weight := getattr(self, name)) is not None:
                yield name, weight

    def names_of(self, part: int) -> list[str]:  # noqa: ARG002
        """Return the names of the weights that a checkpoint has of the `part`-th of `part_names`."""
        return [name for name, _ in self.weights() if name]

    def materialize(self, device: torch.device) -> None:
        """Give this layer's weights memory on `device`; their values are undefined."""
        for name, weight in self.weights():
            setattr(self, name, torch.empty(weight.shape, dtype=weight.dtype, device=device))

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        """Return (target, source): where this rank's shard of a checkpoint's tensor goes, and that shard.

        loaded: the whole tensor of the `part`-th of `part_names`. `kernels.weights.ShapeError` if it has another shape.
        """
        return match_shard(getattr(self, name), loaded)

    def weight_part(self, name: str, part: int) -> torch.Tensor:  # noqa: ARG002
        """Return this rank's shard of a tensor, as a checkpoint would hold it: a view, or a copy where it is packed."""
        weight: torch.Tensor = getattr(self, name)
        return weight

    def move_to(self, device: torch.device) -> None:
        """Move the weights to `device`: they get new addresses."""
        for name, weight in self.weights():
            setattr(self, name, weight.to(device))

    def pack(self) -> None:
        """Lay the weights, once loaded, out as the kernels read them fastest. Nothing else can read them then."""

    def fill_dummy(self, generator: torch.Generator) -> None:
        """Fill with random weights that keep activations in range."""
        for _, weight in self.weights():
            weight.normal_(0, 0.02, generator=generator)


def named_layers(layer: Layer, prefix: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield `layer` and everything below it with its dotted path; a shared layer once for each of its paths."""
    yield prefix, layer
    for name, value in vars(layer).items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Layer):
            yield from named_layers(value, path)
        elif isinstance(value, list):
            for i, child in enumerate(value):
                if isinstance(child, Layer):
                    yield from named_layers(child, f"{path}.{i}")


def unique_layers(layer: Layer) -> list[Layer]:
    """Return `layer` and everything below it, each once."""
    return list({id(child): child for _, child in named_layers(layer)}.values())


def meta_weight(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")

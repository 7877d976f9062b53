"""What every layer is.

Layers are plain objects rather than `torch.nn.Module`s: a forward on a small model is a few hundred attribute
reads, and a module's weights and children are found through `__getattr__`, ten times slower than a plain attribute.
Nothing of a module is needed here: weights are never trained, and they get their device once, when loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from engine.errors import ModelError
from engine.layers.communicator import Communicator


@dataclass(frozen=True)
class Shard:
    """One of `count` equal slices; all of it by default."""

    index: int = 0
    count: int = 1

    def size_of(self, size: int, what: str) -> int:
        if size % self.count:
            raise ModelError(f"{what} is {size}, which cannot be split over {self.count} ranks")
        return size // self.count


WHOLE = Shard()


@dataclass(frozen=True)
class LayerConfig:
    """What all layers of one rank have in common. Passed down, so that model files need not know of it."""

    dtype: torch.dtype
    attention_backend: str = "torch"
    comm: Communicator = field(default_factory=Communicator)

    @property
    def shard(self) -> Shard:
        return Shard(self.comm.rank, self.comm.size)

    def kv_shard(self, num_kv_heads: int) -> Shard:
        """Of keys and values. More ranks than KV heads: several ranks hold the same head."""
        size = self.comm.size
        if size > num_kv_heads and size % num_kv_heads == 0:
            return Shard(self.comm.rank * num_kv_heads // size, num_kv_heads)
        return self.shard

    def num_kv_heads(self, of_all: int) -> int:
        """This rank's share of `of_all`."""
        return self.kv_shard(of_all).size_of(of_all, "num_key_value_heads")

    def split(self, size: int, what: str) -> int:
        """This rank's share of `size`."""
        return self.shard.size_of(size, what)


class Layer:
    """A part of a model. Its attributes that are layers, or lists of layers, are its children.

    Weights start on the meta device, are put on a device by `materialize` and filled through `place_weight`.
    """

    weight_names: ClassVar[tuple[str, ...]] = ()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This layer's own weights, not its children's; an absent bias is None and not listed."""
        for name in self.weight_names:
            if (weight := getattr(self, name)) is not None:
                yield name, weight

    def materialize(self, device: torch.device) -> None:
        """Give this layer's weights memory on `device`; what they hold is undefined."""
        for name, weight in self.weights():
            setattr(self, name, torch.empty(weight.shape, dtype=weight.dtype, device=device))

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (target, source): source is this rank's shard of a checkpoint's tensor, target where it goes.

        `loaded` is the whole tensor, the `part`-th part of weight `name`; only packed layers have more than one.
        `ModelError` if it is of another shape.
        """
        return match_shard(getattr(self, name), loaded)

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        """A view of this rank's shard of the `part`-th part of weight `name`; of a packed weight, a copy."""
        weight = getattr(self, name)
        return weight.to_dense() if weight.is_mkldnn else weight

    def move_to(self, device: torch.device) -> None:
        """Its weights, which no longer have their addresses."""
        for name, weight in self.weights():
            setattr(self, name, weight.to(device))

    def pack(self) -> None:
        """Once loaded: lay the weights out as the kernels read them fastest. Nothing else can read them then."""

    def fill_dummy(self, generator: torch.Generator) -> None:
        """Random weights that keep activations in range."""
        for _, weight in self.weights():
            weight.normal_(0, 0.02, generator=generator)


def named_layers(layer: Layer, prefix: str = "") -> Iterator[tuple[str, Layer]]:
    """`layer` and everything below it with its dotted path. A shared layer comes once for each of its paths."""
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
    return list({id(child): child for _, child in named_layers(layer)}.values())


def meta_weight(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def match_shard(
    target: torch.Tensor, loaded: torch.Tensor, dim: int = 0, shard: Shard = WHOLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(target, the shard of `loaded` along `dim`)."""
    wanted = list(target.shape)
    wanted[dim] *= shard.count
    if list(loaded.shape) != wanted:
        raise ModelError(f"has shape {list(loaded.shape)}, the model wants {wanted}")
    size = target.shape[dim]
    return target, loaded.narrow(dim, shard.index * size, size)

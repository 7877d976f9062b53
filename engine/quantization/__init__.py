"""How a model's weights are stored: what a checkpoint or a flag says of each layer, as a `Scheme`.

A method is a subclass of `Quantization`. It says which scheme a layer has, and turns a checkpoint's tensors, one by
one, into those of `kernels.quantized`'s layout, whose rows are a layer's outputs: so whatever splits, merges or
reorders rows for a family or a rank holds for quantized weights, too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.quantization.dense import DENSE
from kernels.weights import Part, Shard, Weight

Transform = Callable[[torch.Tensor], torch.Tensor]
CHECKED = ""  # the name of what is looked at and kept nowhere
OF_INPUTS = (".order", ".input_scale")  # ends of names of tensors that have no rows


@dataclass(frozen=True)
class With:
    """A transform that needs other tensors of the checkpoint, too: function(loaded, *others).

    The others lie in the mapped file, wherever `loaded` is.
    """

    names: tuple[str, ...]
    function: Callable[..., torch.Tensor]
    optional: bool = False  # it gets None for those that are not there


class Scheme(Protocol):
    """A format of weights. Equal ones can be merged row on row."""

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> Weight:
        """Return an empty weight of the format: rows in `parts`, `k` inputs, products in `dtype`.

        `kernels.weights.ShapeError` if the format has no such shape.
        """

    def input_unit(self, num_inputs: int) -> int:
        """Return how many of a row's `num_inputs` inputs cannot be split over ranks, such as those of one scale."""


class Quantization:
    """The scheme of each layer of a model; of this base class, none is quantized."""

    def scheme_of(self, module: str) -> Scheme:  # noqa: ARG002
        """Return the scheme of a product such as model.layers.0.mlp.down_proj, or lm_head."""
        return DENSE

    def scheme_of_embedding(self, module: str) -> Scheme:  # noqa: ARG002
        """Return the scheme of an embedding such as model.embed_tokens."""
        return DENSE

    def converted(self, name: str) -> Iterable[tuple[str, Sequence[Transform | With]]]:
        """Yield what a checkpoint's tensor becomes: names, and what is done to it for each.

        Nothing: it is not read. `CHECKED`: it is read, and what is done raises `kernels.weights.ShapeError` if it must
        not be as it is.
        """
        yield name, ()

    def scheme_found(self, tensor: str) -> Scheme | None:  # noqa: ARG002
        """Return the scheme of the module that a checkpoint's tensor is of; None: as `scheme_of` says of the model's.

        A weight without a scale beside it is plain all the same.
        """
        return None

    def spare(self, name: str) -> Transform | None:  # noqa: ARG002
        """Return the check of a tensor that no layer has a place for, None if it must not be there."""
        return None

    def in_file(self, name: str) -> str:
        """Return what a checkpoint calls a tensor that `converted` names so."""
        return name


__all__ = ["CHECKED", "DENSE", "OF_INPUTS", "Quantization", "Reader", "Scheme", "Transform", "With"]

Reader = Callable[[Mapping[str, Any]], Quantization]

"""Weight matrices: how one is stored, how a checkpoint fills it, and its product with a step's activations.

A `Weight` hides its format. Layers ask for `product` and say by keyword what stands before it (a norm), after it
(an activation, a residual) and where the result may go; each format fuses what it can and composes the rest.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from kernels.elementwise import act_and_mul
from kernels.tuning import WeightShape


class Norm(Protocol):
    """A normalization of the last dimension, which a product may fuse where it `is_rms`."""

    weight: torch.Tensor  # read only where it `is_rms`
    eps: float

    @property
    def is_rms(self) -> bool:
        """Return whether it is x / sqrt(mean(x²) + eps) * weight and nothing else."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class ShapeError(Exception):
    """A checkpoint's tensor does not have the shape that its place in the model asks for."""


@dataclass(frozen=True)
class Shard:
    """One of `count` equal slices; the whole by default.

    extent: the tensor's length as a share of that of all slices together, where those at its end go on beyond it, and
    have zeros there.
    """

    index: int = 0
    count: int = 1
    extent: Fraction | None = None

    def whole_length(self, size: int) -> int:
        """Return the length of the tensor of which slices have `size`."""
        return size * self.count if self.extent is None else int(size * self.count * self.extent)

    def of(self, loaded: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        """Return this slice, which has `size`, of `loaded` along `dim`: a view, or a copy with zeros at its end."""
        start = min(self.index * size, loaded.shape[dim])
        found = loaded.narrow(dim, start, min(size, loaded.shape[dim] - start))
        if found.shape[dim] == size:
            return found
        padded = loaded.new_zeros([*loaded.shape[:dim], size, *loaded.shape[dim + 1 :]])
        padded.narrow(dim, 0, found.shape[dim]).copy_(found)
        return padded


WHOLE = Shard()


class Part(NamedTuple):
    """Consecutive rows of a weight that come from one tensor of a checkpoint."""

    num_rows: int  # on this rank
    shard: Shard = WHOLE  # which slice of the tensor's rows they are


class Weight(ABC):
    """A matrix [n, k] on this rank: a stack of parts, each a slice of a checkpoint's tensor.

    Starts on the meta device; `materialize` gives it memory, `place` says where a checkpoint's tensors go, and `pack`
    lays it out for its kernels once all are there.
    """

    has_lookup: ClassVar = False

    def __init__(self, parts: Sequence[Part], k: int, input_shard: Shard = WHOLE) -> None:
        """k: inputs on this rank, the slice `input_shard` of the tensor's columns."""
        self.parts, self.k, self.input_shard = tuple(parts), k, input_shard
        *self._starts, self.n = accumulate((part.num_rows for part in parts), initial=0)

    @abstractmethod
    def product(
        self,
        x: torch.Tensor,
        *,
        norm: Norm | None = None,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
        may_overwrite: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return residual + act(norm(x) W^T + bias): x [T, k] -> [T, n], or [T, n / 2] with `act`.

        act: of the first half of the outputs (gate), times the second half (up); see `kernels.elementwise.activate`.
        may_overwrite: the result may be written into `residual`, whose old values are lost then.
        out: [T, n or n / 2], where the result is written and which is returned. Not together with `residual`.
        """

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + bias in float32, [T, k] -> [T, n]: largest where the unrounded sums are.

        Rounded sums of a large vocabulary tie often, and the tie's winner is none of the model's choice.
        """
        return self.product(x, bias=bias).float()

    def normed_logits(
        self, x: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm(x), its `logits`) of x [T, k]."""
        normed = norm(x)
        return normed, self.logits(normed, bias)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows `ids` [T] as [T, k] numbers, if it `has_lookup`: tokens are embedded so."""
        raise NotImplementedError(f"{type(self).__name__} has no rows that can be looked up")

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor that holds the weight, by the last part of its name in a checkpoint ("": in none)."""

    def names_of(self, part: int) -> list[str]:  # noqa: ARG002
        """Return what a checkpoint calls the tensors of a part, as `tensors` does."""
        return [name for name, _ in self.tensors() if name]

    @property
    def storage(self) -> tuple[Hashable, ...]:
        """Return how the matrix is stored: weights for which it is the same have the same kernels."""
        return type(self), self.n, self.k, *((tensor.dtype, tensor.shape) for _, tensor in self.tensors())

    @abstractmethod
    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each tensor by `function` of it."""

    @abstractmethod
    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (target, source), views to copy between, for a checkpoint's whole tensor `name` of a part.

        `ShapeError` if it has another shape.
        """

    @abstractmethod
    def rows_of(self, part: int) -> torch.Tensor:
        """Return this rank's rows of a part as [rows, k] numbers: a view, or a copy if they are packed."""

    def tuning_shape(self, **fused: Any) -> WeightShape | None:
        """Return the shape to tune kernels for, or None if the format has nothing to tune.

        fused: `act`, `has_norm` and `has_residual` of `WeightShape`, as its products have them.
        """
        return None

    def pack(self, *, for_logits: bool = False) -> "Weight":  # noqa: ARG002
        """Return the weight in the layout that its device multiplies fastest; `place` may not work on it any more.

        for_logits: `logits` will be asked for, and may need more than products do.
        """
        return self

    def materialize(self, device: torch.device) -> None:
        """Give the weight memory on `device`; its values are undefined."""
        self.transform(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))

    def fill_random(self, generator: torch.Generator) -> None:
        """Fill with small random values that keep activations in range."""
        for _, tensor in self.tensors():
            tensor.normal_(0, 0.02, generator=generator)

    def row_slice(self, part: int) -> slice:
        """Return the rows of a part."""
        start = self._starts[part]
        return slice(start, start + self.parts[part].num_rows)


class PackedWeight(Weight):
    """A weight that another one was packed into, as one tensor."""

    def __init__(self, plain: Weight, data: torch.Tensor) -> None:
        """Take over `data`, the numbers of `plain` in any layout."""
        super().__init__(plain.parts, plain.k, plain.input_shard)
        self.data = data

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", self.data

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.data = function(self.data)

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("a packed weight is replaced by another one, not filled again")


def finished(
    result: torch.Tensor,
    act: str | None,
    residual: torch.Tensor | None,
    may_overwrite: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `Weight.product` does of x W^T + bias, `result`: for products that fuse nothing behind that."""
    if act is not None:
        result = act_and_mul(result, act)
    if residual is not None:
        return residual.add_(result) if may_overwrite else residual + result
    return result if out is None else out.copy_(result)


def match_shard(
    target: torch.Tensor, loaded: torch.Tensor, dim: int = 0, shard: Shard = WHOLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (target, the slice `shard` of `loaded` along `dim`). `ShapeError` if `loaded` is of another shape."""
    wanted = list(target.shape)
    wanted[dim] = shard.whole_length(wanted[dim])
    if list(loaded.shape) != wanted:
        raise ShapeError(f"has shape {list(loaded.shape)}, the model wants {wanted}")
    return target, shard.of(loaded, dim, target.shape[dim])


def match_shards(
    target: torch.Tensor, loaded: torch.Tensor, shards: Sequence[Shard]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (target, its slice of `loaded`), one shard for each dimension. `ShapeError` if it has another shape."""
    wanted = [shard.whole_length(size) for size, shard in zip(target.shape, shards, strict=True)]
    if list(loaded.shape) != wanted:
        raise ShapeError(f"has shape {list(loaded.shape)}, the model wants {wanted}")
    for dim, shard in enumerate(shards):
        loaded = shard.of(loaded, dim, target.shape[dim])
    return target, loaded

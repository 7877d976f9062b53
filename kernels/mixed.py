"""Weights of different formats that are multiplied as one."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch

from kernels.weights import Norm, Weight, finished


class MixedWeight(Weight):
    """Weights that stand row on row, one a part: their products are made one by one."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        """weights: of the same inputs, and of one part each."""
        first = weights[0]
        super().__init__([part for weight in weights for part in weight.parts], first.k, first.input_shard)
        self.weights = list(weights)

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
        if norm is not None:
            x = norm(x)
        result = torch.cat([weight.product(x, bias=part) for weight, part in self._with(bias)], dim=1)
        return finished(result, act, residual, may_overwrite, out)

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([weight.logits(x, part) for weight, part in self._with(bias)], dim=1)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for weight in self.weights:
            yield from weight.tensors()

    @property
    def storage(self) -> tuple[Hashable, ...]:
        return tuple(weight.storage for weight in self.weights)

    def names_of(self, part: int) -> list[str]:
        return self.weights[part].names_of(0)

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for weight in self.weights:
            weight.transform(function)

    def materialize(self, device: torch.device) -> None:
        for weight in self.weights:
            weight.materialize(device)

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[part].place(name, loaded, 0)

    def rows_of(self, part: int) -> torch.Tensor:
        return self.weights[part].rows_of(0)

    def fill_random(self, generator: torch.Generator) -> None:
        for weight in self.weights:
            weight.fill_random(generator)

    def pack(self, *, for_logits: bool = False) -> Weight:
        self.weights = [weight.pack(for_logits=for_logits) for weight in self.weights]
        return self

    def _with(self, bias: torch.Tensor | None) -> Iterator[tuple[Weight, torch.Tensor | None]]:
        """Yield each weight and its part of a bias."""
        for part, weight in enumerate(self.weights):
            yield weight, None if bias is None else bias[self.row_slice(part)]

"""Products of weights of few bits on a CPU, straight from the codes: `quantized_cpu.cpp`, compiled at the first start.

Codes are decoded in registers and meet unrounded inputs. Rounding inputs to 8 bits for integer products, as llama.cpp
does, is not needed: one permutation of a vector of AVX-512 decodes 16 codes, so that a few tokens take little longer
than one, and AMX takes codes as bfloat16, which are exact, and groups' sums are scaled in float32. Nothing is rounded
but sums, once. Only AVX2 is so slow with float32 that its products of integers take inputs of bfloat16 and float16 as
integers of 16 bits: what moves by that is 2^-16 of the largest of 32 inputs at most, and bfloat16's own last bits are
2^-9 of theirs. A token's results are the same bits alone, beside others and in chunks: where AMX is slower, for three
tokens and fewer, vectors add in its order.

The codes stay where they are, in the layout of `QuantizedWeight`, and are shared with an embedding that is tied to the
head. Without a C++ compiler weights are decoded when they are loaded, and are as large and as fast as `DenseWeight`s.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from kernels.dense import DenseWeight
from kernels.launch import address
from kernels.products_cpu import CODES, TYPES, CpuWeight, Kernels, WeightFields, kernels_ahead, type_of
from kernels.quantized_format import Coded
from kernels.weights import Norm, Weight


class Definition(Coded, Protocol):
    """Stand for a `kernels.quantized.QuantizedWeight`, whose memory and slow ways are used."""

    @property
    def meanings(self) -> torch.Tensor: ...
    def changed_inputs(self, x: torch.Tensor) -> torch.Tensor: ...
    def decoded(self) -> torch.Tensor: ...
    def lookup(self, ids: torch.Tensor) -> torch.Tensor: ...
    def rows_of(self, part: int) -> torch.Tensor: ...
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None: ...
    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]: ...


class CpuQuantizedWeight(CpuWeight):
    """A matrix [n, k] as codes; it shares the tensors of the weight that defines it."""

    has_lookup = True

    def __init__(self, definition: Definition, kernels: Kernels) -> None:
        super().__init__(kernels, definition.parts, definition.k, definition.input_shard)
        self.definition = definition
        self._changes_inputs = definition.form.inputs is not None or "order" in definition.fields
        self._describe()

    def product(self, x: torch.Tensor, *, norm: Norm | None = None, **keywords: Any) -> torch.Tensor:
        if norm is not None and self._changes_inputs:
            x, norm = norm(x), None
        return super().product(x, norm=norm, **keywords)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.definition.lookup(ids)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.definition.tensors()

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.definition.transform(function)
        self._describe()

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.definition.place(name, loaded, part)

    def rows_of(self, part: int) -> torch.Tensor:
        return self.definition.rows_of(part)

    def can_chain(self, act: str | None = None) -> bool:
        return not self._changes_inputs and super().can_chain(act)

    def _describe(self) -> None:
        form, fields = self.definition.form, self.definition.fields
        codes, scale, zero = fields["codes"], fields["scale"], fields.get("zero")
        meanings = self.definition.meanings
        self._described = (meanings, *fields.values())
        self._weight = WeightFields(
            codes.data_ptr(), scale.data_ptr(), address(zero), address(fields.get("minimum")),
            meanings.data_ptr(), self.n, self.k, form.group_size_of(self.k), scale.shape[1],
            CODES[form.code], TYPES[scale.dtype], type_of(zero), form.table is not None, form.offset,
        )  # fmt: skip

    def _multiply(self, x: torch.Tensor, *args: Any, **keywords: Any) -> None:
        super()._multiply(self.definition.changed_inputs(x) if self._changes_inputs else x, *args, **keywords)


def pack_for_cpu(weight: Definition, *, for_logits: bool = False) -> Weight | None:
    """Return `weight` in the layout that this CPU multiplies fastest, None if it is that already."""
    if (kernels := kernels_ahead().result()) is not None:
        sizes = weight.k, weight.form.group_size_of(weight.k), weight.fields["scale"].shape[1]
        return CpuQuantizedWeight(weight, kernels) if kernels.can_multiply(*sizes) else None
    if weight.form.inputs is not None:  # a dense weight does not round them
        return None
    dense = DenseWeight(weight.parts, weight.k, weight.dtype, weight.input_shard, weight.decoded())
    return dense.pack(for_logits=for_logits)

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

import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch

from kernels.chain_cpu import Operation
from kernels.cpp import begin, load_library
from kernels.dense import DenseWeight
from kernels.launch import address
from kernels.quantized_format import Coded
from kernels.weights import Norm, Weight, finished

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
CODES = {"int4": 0, "int8": 1, "fp8": 2}
MAX_CHAINED = 48  # tokens; MIN_CHUNK of quantized_cpu.cpp
ACTS = {None: 0, "silu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}  # others are a pass of their own


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


class _Weight(ctypes.Structure):
    """`Weight` of quantized_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "minimum", "values")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group_size", "num_groups")),
        *((name, ctypes.c_int32) for name in ("code", "scale_type", "zero_type", "has_table")),
        ("offset", ctypes.c_float),
    )


class _Call(ctypes.Structure):
    """`Call` of quantized_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "norm", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "x_stride", "residual_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("type", "norm_type", "bias_type", "residual_type", "out_type", "act")),
        ("num_threads", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


class Kernels:
    """The compiled library, for this CPU or an older one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.multiply: Any = library.product
        self.plan: Any = library.plan_product
        self.lanes: int = library.lanes()
        self.has_tiles = bool(library.enable_tiles())
        self.max_groups: int = library.max_groups()

    def can_multiply(self, weight: Definition) -> bool:
        """Return whether a weight's rows and groups fall into whole blocks of two vectors."""
        group_size, num_groups = weight.form.group_size_of(weight.k), weight.fields["scale"].shape[1]
        has_whole_blocks = weight.k % (2 * self.lanes) == 0 and num_groups <= self.max_groups
        return has_whole_blocks and (group_size % (2 * self.lanes) == 0 or group_size == self.lanes)


def load_kernels(march: str | None = None) -> Kernels | None:
    """Return the kernels for this CPU, or for all from `march` on; None where they cannot be compiled."""
    if (library := load_library(SOURCE, march)) is None:
        return None
    kernels = Kernels(library)
    logger.info(
        "weights of few bits are multiplied in vectors of %d float32%s", kernels.lanes,
        ", and in AMX's tiles for bfloat16" if kernels.has_tiles else "",
    )  # fmt: skip
    return kernels


@functools.cache
def kernels_ahead() -> "Future[Kernels | None]":
    """Begin to load this CPU's kernels, while a checkpoint is read."""
    return begin(load_kernels)


class CpuQuantizedWeight(Weight):
    """A matrix [n, k] as codes that `kernels` multiply; it shares the tensors of the weight that defines it."""

    has_lookup = True

    def __init__(self, definition: Definition, kernels: Kernels) -> None:
        super().__init__(definition.parts, definition.k, definition.input_shard)
        self.definition, self.kernels = definition, kernels
        self._changes_inputs = definition.form.inputs is not None or "order" in definition.fields
        self._describe()

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
        dtype = x.dtype
        if norm is not None and (not norm.is_rms or self._changes_inputs):
            x, norm = norm(x), None
        if act is not None and act not in ACTS:
            return finished(self.product(x, norm=norm, bias=bias), act, residual, may_overwrite, out)
        if out is None:
            num_outputs = self.n if act is None else self.n // 2
            out = residual if residual is not None and may_overwrite else x.new_empty(len(x), num_outputs, dtype=dtype)
        self._multiply(x, out, norm, bias, act, residual)
        return out

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.empty(len(x), self.n)
        self._multiply(x, logits, bias=bias)
        return logits

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

    def _describe(self) -> None:
        form, fields = self.definition.form, self.definition.fields
        codes, scale, zero = fields["codes"], fields["scale"], fields.get("zero")
        self._meanings = self.definition.meanings
        self._described = (self._meanings, *fields.values())
        self._weight = _Weight(
            codes.data_ptr(), scale.data_ptr(), address(zero), address(fields.get("minimum")),
            self._meanings.data_ptr(), self.n, self.k, form.group_size_of(self.k), scale.shape[1],
            CODES[form.code], TYPES[scale.dtype], _type(zero), form.table is not None, form.offset,
        )  # fmt: skip

    def _multiply(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        norm: Norm | None = None,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> None:
        """Write residual + act(norm(x) W^T + bias) into `out`."""
        if self._changes_inputs:
            x = self.definition.changed_inputs(x)
        if x.stride(1) != 1:
            x = x.contiguous()
        if residual is not None and residual.stride(1) != 1:
            residual = residual.contiguous()
        call = _call(x, out, norm, bias, act, residual)
        if self.kernels.multiply(ctypes.byref(self._weight), ctypes.byref(call)):
            raise MemoryError(f"a product of {len(x)} tokens and {self.n} x {self.k} weights")

    def can_chain(self, act: str | None = None) -> bool:
        """Return whether `operation` has all that `product` does."""
        return not self._changes_inputs and act in ACTS

    def operation(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        norm: Norm | None = None,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> Operation:
        """Return a product of up to MAX_CHAINED tokens, which may overwrite its residual; rows are contiguous."""
        call = _call(x, out, norm, bias, act, residual)
        return Operation(self.kernels.plan, self._weight, call, (self._described, x, out, norm, bias, residual))


def _call(
    x: torch.Tensor,
    out: torch.Tensor,
    norm: Norm | None,
    bias: torch.Tensor | None,
    act: str | None,
    residual: torch.Tensor | None,
) -> _Call:
    norm_weight = None if norm is None else norm.weight
    return _Call(
        x.data_ptr(), address(norm_weight), address(bias), address(residual), out.data_ptr(),
        len(x), x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        TYPES[x.dtype], _type(norm_weight), _type(bias), _type(residual), TYPES[out.dtype], ACTS[act],
        torch.get_num_threads(), 0.0 if norm is None else norm.eps,
    )  # fmt: skip


def pack_for_cpu(weight: Definition, *, for_logits: bool = False) -> Weight | None:
    """Return `weight` in the layout that this CPU multiplies fastest, None if it is that already."""
    if (kernels := kernels_ahead().result()) is not None:
        return CpuQuantizedWeight(weight, kernels) if kernels.can_multiply(weight) else None
    if weight.form.inputs is not None:  # a dense weight does not round them
        return None
    dense = DenseWeight(weight.parts, weight.k, weight.dtype, weight.input_shard, weight.decoded())
    return dense.pack(for_logits=for_logits)


def _type(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else TYPES[tensor.dtype]

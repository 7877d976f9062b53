"""Products with weights on a CPU by kernels of our own: `quantized_cpu.cpp`, compiled at the first start.

What all weights have in common that it multiplies, and those of plain numbers; codes are those of `quantized_cpu`.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from kernels.chain_cpu import Operation
from kernels.cpp import begin, load_library
from kernels.launch import address
from kernels.weights import Norm, Part, Shard, Weight, finished

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("quantized_cpu.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
CODES = {"int4": 0, "int8": 1, "fp8": 2}
NUMBERS = 3  # among them, of 16 bits and without scales
MAX_CHAINED = 48  # tokens; MIN_CHUNK of quantized_cpu.cpp
ACTS = {None: 0, "silu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}  # others are a pass of their own


class WeightFields(ctypes.Structure):
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

    def can_multiply(self, k: int, group_size: int, num_groups: int) -> bool:
        """Return whether rows of `k` inputs and groups fall into whole blocks of two vectors."""
        has_whole_blocks = k % (2 * self.lanes) == 0 and num_groups <= self.max_groups
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


class CpuWeight(Weight):
    """A matrix [n, k] that `kernels` multiply, as `_weight` says."""

    def __init__(self, kernels: Kernels, parts: Sequence[Part], k: int, input_shard: Shard) -> None:
        super().__init__(parts, k, input_shard)
        self.kernels = kernels
        self._weight: WeightFields
        self._described: tuple[torch.Tensor, ...]  # what it points to

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
        if norm is not None and not norm.is_rms:
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
        if x.stride(1) != 1:
            x = x.contiguous()
        if residual is not None and residual.stride(1) != 1:
            residual = residual.contiguous()
        call = _call(x, out, norm, bias, act, residual)
        if self.kernels.multiply(ctypes.byref(self._weight), ctypes.byref(call)):
            raise MemoryError(f"a product of {len(x)} tokens and {self.n} x {self.k} weights")

    def can_chain(self, act: str | None = None) -> bool:
        """Return whether `operation` has all that `product` does."""
        return act in ACTS

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


class CpuNumbersWeight(CpuWeight):
    """A matrix [n, k] of 16 bits, on a CPU without units for these: widened in registers, multiplied in float32."""

    def __init__(self, plain: Weight, data: torch.Tensor, kernels: Kernels) -> None:
        super().__init__(kernels, plain.parts, plain.k, plain.input_shard)
        self.data = data
        self._describe()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", self.data

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.data = function(self.data)
        self._describe()

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("a packed weight is replaced by another one, not filled again")

    def rows_of(self, part: int) -> torch.Tensor:
        return self.data[self.row_slice(part)]

    def _describe(self) -> None:
        data = self.data
        self._described = (data,)
        self._weight = WeightFields(
            codes=data.data_ptr(), n=self.n, k=self.k, group_size=self.k, code=NUMBERS, scale_type=TYPES[data.dtype]
        )


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
        TYPES[x.dtype], type_of(norm_weight), type_of(bias), type_of(residual), TYPES[out.dtype], ACTS[act],
        torch.get_num_threads(), 0.0 if norm is None else norm.eps,
    )  # fmt: skip


def pack_numbers(weight: Weight, data: torch.Tensor) -> Weight | None:
    """Return a matrix of 16 bits as what kernels multiply, None where there are none for it."""
    kernels = kernels_ahead().result()
    if kernels is None or not data.is_contiguous() or not kernels.can_multiply(weight.k, weight.k, 0):
        return None
    return CpuNumbersWeight(weight, data, kernels)


def type_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else TYPES[tensor.dtype]

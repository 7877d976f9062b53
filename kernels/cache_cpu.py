"""Rotation with the store of keys and values, and their gathering, on a CPU: `cache_cpu.cpp`, compiled once.

In torch the first is some thirty operations on a few thousand numbers, which in a step of one token take as long as a
third of a small model's products. A call has the same results, but for the last bit of what a norm or a rotation
rounds: prompts and single tokens take the same way, so that an answer does not depend on which of the two a token was
part of. That is also why attention itself stays torch's: its kernel for prompts has an exponential of its own.

Without a C++ compiler, and for what is not compiled (a float8 cache, heads of odd sizes), the definitions run.
"""

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from kernels.chain_cpu import Chain, Operation
from kernels.cpp import begin, load_library
from kernels.launch import address

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIZE_MULTIPLE, MAX_SIZE = 16, 1024  # of a head
Norms = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, float]
"""Weights of norms of query, key and value heads, and what is added under their roots."""
MAX_KEPT_BYTES = 16 << 20  # of keys and values that stay from layer to layer; more would be a second cache


class _Rope(ctypes.Structure):
    """`Rope` of cache_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "q_norm", "k_norm", "v_norm", "positions", "slots", "cos_sin")),
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        *((name, ctypes.c_int64) for name in ("qkv_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int32) for name in ("type", "norm_type", "v_norm_type", "num_threads")),
        ("eps", ctypes.c_float),
    )


class _Gather(ctypes.Structure):
    """`Gather` of cache_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k_cache", "v_cache", "to", "slots")),
        *((name, ctypes.c_int64) for name in ("num_rows", "row_bytes", "k_stride", "v_stride", "num_threads")),
    )


class Kernels:
    """The compiled library, for this CPU or an older one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rope: Any = library.rope_and_store
        self._gather: Any = library.gather
        self._plan_rope, self._plan_gather, self._run_chain = library.plan_rope, library.plan_gather, library.run_chain
        self.use_threads: Any = library.use_threads  # (number): torch's, for what the calling thread asks of it
        self.types = dict(TYPES)
        if not library.has_float16():
            del self.types[torch.float16]

    def can_rotate(self, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Return whether `rope_and_store` takes heads in qkv's dtype and these caches."""
        size, dtype = k_cache.shape[2], qkv.dtype
        has_kernel = dtype is k_cache.dtype and dtype in self.types and size % SIZE_MULTIPLE == 0 and size <= MAX_SIZE
        return has_kernel and k_cache.stride(1) == v_cache.stride(1) == size and qkv.stride(1) == 1

    def rope_and_store(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out_cache_loc: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
        v_norm: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run `kernels.elementwise.rope_and_store`; `can_rotate` must hold, and both norms have one dtype."""
        q = qkv.new_empty(len(qkv), num_heads, head_dim)
        norms = q_norm, k_norm, v_norm, eps
        call = _rope_call(qkv, q, cos_sin, k_cache, v_cache, num_heads, num_kv_heads, norms)
        call.positions, call.slots = positions.data_ptr(), out_cache_loc.data_ptr()
        self._rope(ctypes.byref(call))
        return q

    def rope_operation(
        self,
        qkv: torch.Tensor,
        q: torch.Tensor,
        cos_sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        norms: Norms,
    ) -> Operation:
        """Return `rope_and_store` into `q`; its call's positions, slots and caches are the caller's to set and keep."""
        call = _rope_call(qkv, q, cos_sin, k_cache, v_cache, num_heads, num_kv_heads, norms)
        return Operation(self._plan_rope, None, call, (qkv, q, cos_sin, norms))

    def gather_operation(self, cache: torch.Tensor) -> Operation:
        """Return what gathers slots of caches such as `cache`; see `Gathered.aim`."""
        return Operation(self._plan_gather, None, _gather_call(cache), ())

    def chain(self, operations: Sequence[Operation]) -> Chain:
        """Return operations, of this library or of another one of a CPU, as one call."""
        return Chain(self._run_chain, operations)

    def can_gather(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
        """Return whether the slots of both caches are rows of one length, as far apart in one as in the other."""
        is_alike = k_cache.is_cpu and k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride()
        return is_alike and v_cache is not k_cache and k_cache.stride(1) == k_cache.shape[2] and k_cache.stride(2) == 1

    def room_for(self, cache: torch.Tensor, slots: torch.Tensor, num_requests: int) -> "Gathered":
        """Return room for keys and values of `slots` (int32), as many for each request, of caches such as `cache`."""
        return Gathered(self._gather, cache, slots, num_requests)


class Gathered:
    """Keys and values of some slots, of one layer after the other: each overwrites those of the layer before."""

    def __init__(self, gather: Any, cache: torch.Tensor, slots: torch.Tensor, num_requests: int) -> None:
        assert cache[0].is_contiguous() and slots.dtype == torch.int32
        self._gather, self._slots = gather, slots
        self._shape = (2, num_requests, len(slots) // num_requests, *cache.shape[1:])
        self._call = _gather_call(cache)
        self._pointer = ctypes.byref(self._call)
        num_bytes = 2 * len(slots) * self._call.row_bytes
        self._kept = cache.new_empty(self._shape) if num_bytes <= MAX_KEPT_BYTES else None

    def of(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's, [N, Hkv, L, D] each, of caches whose slots lie as those of `cache`."""
        found = self.aim(self._call, k_cache, v_cache)
        self._gather(self._pointer)
        return found

    def aim(self, call: Any, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where `call`, of `Kernels.gather_operation`, will put what `of` returns."""
        rows = k_cache.new_empty(self._shape) if self._kept is None else self._kept
        call.k_cache, call.v_cache, call.to = k_cache.data_ptr(), v_cache.data_ptr(), rows.data_ptr()
        call.slots, call.num_rows = self._slots.data_ptr(), len(self._slots)
        k, v = rows.transpose(2, 3)
        return k, v


def load_kernels(march: str | None = None) -> Kernels | None:
    """Return the kernels for this CPU, or for all from `march` on; None where they cannot be compiled."""
    library = load_library(SOURCE, march, without="answers of single requests are slower")
    return None if library is None else Kernels(library)


@functools.cache
def kernels_ahead() -> "Future[Kernels | None]":
    """Begin to load this CPU's kernels, while a checkpoint is read."""
    return begin(load_kernels)


@functools.cache
def kernels() -> Kernels | None:
    """Return this CPU's kernels, None where there are none."""
    return kernels_ahead().result()


def _rope_call(
    qkv: torch.Tensor,
    q: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: Norms,
) -> _Rope:
    q_norm, k_norm, v_norm, eps = norms
    norm = k_norm if q_norm is None else q_norm
    return _Rope(
        qkv.data_ptr(), address(q_norm), address(k_norm), address(v_norm), None, None, cos_sin.data_ptr(),
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), len(qkv), num_heads, num_kv_heads, q.shape[2],
        cos_sin.shape[1], qkv.stride(0), k_cache.stride(0), v_cache.stride(0), TYPES[qkv.dtype], _type(norm),
        _type(v_norm), torch.get_num_threads(), eps,
    )  # fmt: skip


def _gather_call(cache: torch.Tensor) -> _Gather:
    size = cache.dtype.itemsize
    stride = cache.stride(0) * size
    return _Gather(None, None, None, None, 0, cache[0].numel() * size, stride, stride, torch.get_num_threads())


def _type(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else TYPES[tensor.dtype]

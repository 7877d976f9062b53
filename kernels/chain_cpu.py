"""Compiled kernels of a CPU that run one after the other in one call, for which threads are woken once."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """A call of a compiled kernel, whose structure may be changed between two runs."""

    plan: Any  # the library's function that adds it to a plan
    weight: ctypes.Structure | None
    call: ctypes.Structure
    kept: tuple[Any, ...]  # what the two point to


class _Operation(ctypes.Structure):
    """`Operation` of cache_cpu.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("plan", "weight", "call"))


class Chain:
    """Operations in their order."""

    def __init__(self, run: Any, operations: Sequence[Operation]) -> None:
        """run: `run_chain` of the library."""
        self._run, self._operations = run, tuple(operations)  # which are kept alive
        self._array = (_Operation * len(operations))(*map(_pointers, operations))

    def __len__(self) -> int:
        return len(self._operations)

    def run(self, count: int, num_threads: int) -> None:
        """Run the first `count` operations."""
        if self._run(self._array, count, num_threads):
            raise MemoryError(f"{count} compiled operations")


def _pointers(operation: Operation) -> _Operation:
    plan = ctypes.cast(operation.plan, ctypes.c_void_p)
    weight = None if operation.weight is None else ctypes.addressof(operation.weight)
    return _Operation(plan, weight, ctypes.addressof(operation.call))

"""Launching Triton kernels cheaply: Triton's own way costs the host more than many of our kernels cost the GPU."""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch

from kernels.card import HOPPER, card_of
from kernels.compilers import CompilingThreads

logger = logging.getLogger(__name__)

SLOW_COMPILING_S = 2.0  # reading the kernels of an earlier start takes less
SLOW_LAUNCH_S = 0.2  # a first launch that takes longer has compiled; a kernel of an earlier start comes from disk


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own is a traced function, ten times slower to call."""
    return -(-a // b)


def address(tensor: torch.Tensor | None) -> int | None:
    """Return where a tensor lies, for a kernel that takes None for one that is not there."""
    return None if tensor is None else tensor.data_ptr()


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; 2 where Triton's interpreter stands in for one."""
    return card_of(device).num_sms


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Return whether a kernel may be launched before the one ahead of it has ended (Hopper and later).

    Such a kernel reads nothing that a kernel before it writes until `gdc_wait`. Every kernel that lets its dependents
    start early also waits itself, so that the end of one means the end of all before it.
    """
    return card_of(device).capability >= HOPPER


@functools.cache
def _counters(device: torch.device, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def arrival_counters(device: torch.device, size: int) -> torch.Tensor:
    """Return int32 zeros, which every kernel leaves as zeros. The first call must not be inside a graph's capture."""
    return _counters(device, max(16384, next_power_of_2(size)))


class _Rehearsal:
    """The kernels that one thread's launches have asked for while it only compiles."""

    def __init__(self, threads: Executor) -> None:
        self.thread, self.threads = threading.get_ident(), threads
        self.kernels: dict[Any, Any] = {}  # Triton's, or its futures of them, by what they are compiled for
        self.others: dict[Any, Future[Any]] = {}  # by who compiles them: see `compile_ahead`


_rehearsal: _Rehearsal | None = None


def only_compiles() -> bool:
    """Return whether this thread's launches only compile: see `compiling_ahead`."""
    return _rehearsal is not None and _rehearsal.thread == threading.get_ident()


def compile_ahead(compile: Callable[..., object], *args: Any) -> None:
    """While this thread only compiles: have another one call `compile`, once, before `compiling_ahead` ends."""
    assert _rehearsal is not None
    if (compile, args) not in _rehearsal.others:
        _rehearsal.others[compile, args] = _rehearsal.threads.submit(compile, *args)


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile the kernels that this thread's launches lack, many at once; all are ready when the context ends.

    Nothing is launched in it, so results are arbitrary.
    """
    import triton  # here: a machine without a GPU need not have it

    global _rehearsal
    start = time.perf_counter()
    num_threads = len(os.sched_getaffinity(0))
    initializer = None
    if torch.cuda.is_available():
        initializer = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
    notice = threading.Timer(SLOW_COMPILING_S, logger.info, ["compiling kernels, for later starts too"])
    notice.start()
    new_threads = functools.partial(ThreadPoolExecutor, num_threads, "compiler", initializer)
    try:
        with new_threads() as threads, new_threads() as others:  # which wait for no process
            rehearsal = _rehearsal = _Rehearsal(others)
            executor = CompilingThreads(threads)
            with executor.noting(), triton.AsyncCompileMode(executor):
                yield
            _load_all(rehearsal.kernels.values(), threads)
            for future in rehearsal.others.values():
                future.result()
    finally:
        notice.cancel()
        _rehearsal = None
    if (took_s := time.perf_counter() - start) > SLOW_COMPILING_S:
        logger.info("compiled %d kernels in %.1f s", len(rehearsal.kernels), took_s)


_loaded: set[tuple[str, ...]] = set()  # launchers of this process, by the types of their arguments in C
_loading = threading.Lock()  # for who loads launchers: see `_load_all`
ALIKE_IN_C = {"i1": "i8", "u1": "u8", "f32": "fp32"}


def _load_all(kernels: Iterable[Any], threads: Executor) -> None:
    """Load kernels to the device and compile their launchers, which are C and have their own compiler, many at once.

    Triton loads all launchers as modules of one name, and those of alike arguments from one file. What Python returns
    for a file's second load is the newest module of that name, changed to the file's: another thread may be about to
    read that one. So each file is loaded once by many threads, and all further loads follow one by one.
    """
    new, alike = [], []
    compiled = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]
    with _loading:
        for kernel in compiled:
            (alike if (launcher := _launcher(kernel)) in _loaded else new).append(kernel)
            _loaded.add(launcher)
        list(threads.map(_load, new))
        for kernel in alike:
            _load(kernel)


def _launcher(kernel: Any) -> tuple[str, ...]:
    """Return what a launcher's file depends on: a pointer is one to anything."""
    kinds = [kind for kind in map(str, kernel.src.signature.values()) if kind != "constexpr"]
    return tuple("*" if kind.startswith("*") else ALIKE_IN_C.get(kind, kind) for kind in kinds)


def _load(kernel: Any) -> None:
    """Load a kernel and its launcher, unless they have been."""
    from triton.runtime.errors import OutOfResources

    with contextlib.suppress(OutOfResources):  # its first launch takes fewer stages
        _ = kernel.run


class Kernel:
    """A `triton.jit` function launched as `kernel[grid](*args, **constexprs_and_options)`.

    Arguments come in the order of the signature: first the ordinary ones by position, then the constexprs by name.
    A launch like an earlier one, by all that Triton specializes on (types, integers that are 1 or multiples of 16,
    pointers aligned to 16 bytes), goes straight to the compiled kernel.
    """

    def __init__(self, function: Any) -> None:
        self.function = function  # triton.JITFunction; its interpreter's stand-in has no compiled kernels
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_")

    def __getitem__(self, grid: tuple[int, ...]) -> "_Launch":
        return _Launch(self, grid)

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        key = (tuple(keywords.values()), tuple([_kind(arg) for arg in args]))
        known = self._compiled.get(key)
        if _rehearsal is not None and only_compiles():
            if known is None and (self, key) not in _rehearsal.kernels:
                _rehearsal.kernels[self, key] = self.function.run(*args, grid=grid, warmup=True, **keywords)
            return
        if known is not None:
            kernel, constexprs = known
            kernel[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *constexprs)
            return
        start = time.perf_counter()
        kernel = self._first_launch(grid, args, keywords)
        if (took_s := time.perf_counter() - start) > SLOW_LAUNCH_S:
            logger.info("compiled %s in %.1f s", self.name, took_s)
        if hasattr(kernel, "packed_metadata"):
            names = self.function.arg_names[len(args) :]
            self._compiled[key] = kernel, tuple(keywords[name] for name in names)

    def _first_launch(self, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Launch by Triton, which compiles. A GPU with less shared memory than the stages need gets fewer of them."""
        from triton.runtime.errors import OutOfResources  # here: a machine without a GPU need not have it

        try:
            if (compiled := self.function.run(*args, grid=grid, warmup=True, **keywords)) is not None:
                with _loading:
                    _load(compiled)
                    _loaded.add(_launcher(compiled))
            return self.function[grid](*args, **keywords)
        except OutOfResources as error:
            num_stages = keywords.get("num_stages", 1) - 1
            if not num_stages:
                raise
            logger.info("%s gets %d stages in place of %d: %s", self.name, num_stages, num_stages + 1, error)
            return self._first_launch(grid, args, keywords | {"num_stages": num_stages})


class _Launch:
    __slots__ = ("grid", "kernel")

    def __init__(self, kernel: Kernel, grid: tuple[int, ...]) -> None:
        self.kernel, self.grid = kernel, grid

    def __call__(self, *args: Any, **keywords: Any) -> None:
        self.kernel.launch(self.grid, args, keywords)


def _kind(arg: Any) -> Any:
    """Return the properties of an argument that Triton compiles separate kernels for."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg % 16 == 0 if arg != 1 else 1.0
    return arg.__class__


def fast_launch(function: Any) -> Kernel:
    """Wrap a `@triton.jit` function that the host launches; a decorator."""
    return Kernel(function)

"""Compile a C++ file of this package for the CPU it runs on, once.

Vector units differ between CPUs, so that a library made elsewhere would be slow or would not run. A machine needs a
compiler for its first start only: the system's, or that of the PyPI package `ziglang`, which needs no administrator.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from kernels.folders import cache_folder

T = TypeVar("T")
logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-fno-tree-vectorize", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-w")
TIMEOUT_S = 120.0
MARCHES = {"avx2": "haswell", "avx512": "skylake-avx512"}  # by torch's word for the units


@functools.cache
def load_library(
    source: Path, march: str | None = None, without: str = "weights of few bits are slower or larger"
) -> ctypes.CDLL | None:
    """Return the library of `source`, compiled if no earlier start did; None, and a warning, if that is impossible.

    march: the oldest CPU that it shall run on, in the words of GCC. without: what follows if there is none.
    """
    march = march or own_march()
    command = find_compiler()
    if command is None:
        logger.warning("no C++ compiler here: %s (pip install ziglang is one)", without)
        return None
    text = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    path = cache_folder() / "cpu" / f"{source.stem}-{_key(text, command, march)}.so"
    try:
        if not path.exists():
            _compile(command, source, march, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning("%s cannot be compiled: %s (%s)", source.name, without, detail)
        return None


def own_march() -> str:
    """Return this CPU in the words of GCC, or the older one that torch is held to."""
    return MARCHES.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), "native")


def begin(load: Callable[[], T]) -> "Future[T]":
    """Begin to load kernels, on a thread: while a checkpoint is read."""
    thread = ThreadPoolExecutor(1, "compiler")
    try:
        return thread.submit(load)
    finally:
        thread.shutdown(wait=False)


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """Return the beginning of a command that compiles C++, or None."""
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang", "cc", "-x", "c++", "-nostdlib++")  # its "c++" first builds a library


def _compile(command: tuple[str, ...], source: Path, march: str, path: Path) -> None:
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        subprocess.run(
            (*command, *FLAGS, f"-march={march}", "-o", str(made), str(source)),
            check=True, capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        made.replace(path)  # whole or not at all, whoever else compiles it
    logger.info("compiled %s in %.1f s, for later starts too", source.name, time.perf_counter() - start)


def _key(text: bytes, command: tuple[str, ...], march: str) -> str:
    """Return what changes with the source, the compiler, and the CPU if the library is for this one alone."""
    parts = [text, " ".join((*command, *FLAGS, march)).encode(), platform.machine().encode()]
    with contextlib.suppress(OSError):
        found = os.stat(os.path.realpath(command[0]))
        parts.append(f"{found.st_size} {found.st_mtime_ns}".encode())
    if march == "native":
        parts.append(_cpu().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    """Return the names of this CPU's model and units, where the system says them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        lines = file.read().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model", "stepping", "flags", "vendor")))
    return platform.processor()

"""Kernels in CUDA C++: compiled by NVRTC, which comes with torch, and kept on disk for later starts."""

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kernels.folders import cache_folder
from kernels.launch import compile_ahead, only_compiles

logger = logging.getLogger(__name__)

OLDEST_NVRTC = (12, 0)


def check(answer: tuple[Any, ...]) -> Any:
    """Return the values of a CUDA call's answer; raise RuntimeError if it failed."""
    error, *values = answer
    if error:
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


def joined(defines: Mapping[str, object], *files: str) -> str:
    """Return a kernel's source: files of this folder, one behind the other, with `defines` in front."""
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join([*lines, *((Path(__file__).parent / file).read_text() for file in files)])


@functools.cache
def has_nvrtc() -> bool:
    """Return whether NVRTC can be used; warn if not."""
    try:
        from cuda.bindings import nvrtc

        version = check(nvrtc.nvrtcVersion())
        if version < OLDEST_NVRTC:
            raise RuntimeError(f"it is of CUDA {version[0]}.{version[1]}")
    except (ImportError, RuntimeError) as error:
        logger.warning("kernels in CUDA are replaced by slower ones: NVRTC cannot be used (%s)", error)
        return False
    return True


@functools.cache
def compile_source(name: str, source: str, architecture: str) -> bytes:
    """Return the source's cubin for an architecture ("sm_90"); from disk, if it was compiled before."""
    from cuda.bindings import nvrtc  # here: only torch's CUDA builds bring it

    version = check(nvrtc.nvrtcVersion())
    key = hashlib.sha256(f"{version} {architecture} {source}".encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if path.exists():
        return path.read_bytes()
    start = time.perf_counter()
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC could not compile {name}.cu: {log.decode()}")
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    with contextlib.suppress(OSError):  # nowhere to keep it: the next start compiles again
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(cubin)
        unfinished.replace(path)
    logger.info("compiled %s in %.1f s", name, time.perf_counter() - start)
    return cubin


def compile_sources(name: str, sources: Sequence[str], architecture: str) -> None:
    """Compile several kernels of a name at once. In a rehearsal they are only begun: see `compile_ahead`."""
    if only_compiles():
        for source in sources:
            compile_ahead(compile_source, name, source, architecture)
    elif sources:
        with ThreadPoolExecutor(len(sources)) as threads:
            list(threads.map(lambda source: compile_source(name, source, architecture), sources))

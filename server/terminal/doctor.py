"""`radixloop doctor`: what this machine can run, a line each, without loading a model.

Each line says one fact and how it bears on serving: `ok`, `note` (slower, or less can be served), or `FAIL`, which
ends the command with status 1.
"""

import argparse
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.step.host_memory import available_host_memory

GIB = 1 << 30
LEAST_PYTHON = (3, 11)
NEEDED = ("torch", "aiohttp", "transformers", "tokenizers", "safetensors", "llguidance", "uvloop")
EXTRAS = {  # module -> what its absence means
    "gguf": "the demo's and other GGUF files are not read: pip install 'radixloop[demo]'",
    "sentencepiece": "models that have only a sentencepiece vocabulary are not read: pip install sentencepiece",
    "tiktoken": "models that have only a tiktoken vocabulary are not read: pip install tiktoken",
}
LEAST_MEMORY, LEAST_DISK, LEAST_SHM = GIB, 5 * GIB, GIB
LEAST_FILES = 4096  # a connection takes one
OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """Say one fact about the machine. `verdict` is OK, NOTE or FAIL."""

    verdict: str
    subject: str
    fact: str

    def line(self) -> str:
        return f"{self.verdict:<5} {self.subject:<13} {self.fact}"


def main(argv: Sequence[str]) -> int:
    """Print the findings. Returns 1 if one of them is that nothing can be served here."""
    parser = argparse.ArgumentParser(prog="radixloop doctor", description="Say what this machine can run.")
    parser.add_argument("--host", default="127.0.0.1", help="address that the server shall listen on")
    parser.add_argument("--port", type=int, default=30000, help="its port")
    args = parser.parse_args(argv)
    has_failed = False
    for finding in examine(args.host, args.port):
        print(finding.line(), flush=True)  # torch takes seconds
        has_failed |= finding.verdict == FAIL
    print("This machine cannot serve a model." if has_failed else "This machine can serve models.")
    return int(has_failed)


def examine(host: str, port: int) -> Iterator[Finding]:
    """Yield the findings, those first that take no time."""
    yield from find_python()
    yield from find_packages(has_module)
    yield from find_host_memory(available_host_memory())
    yield from find_limits()
    yield from find_folders()
    yield from find_port(host, port)
    if has_module("torch"):
        yield from find_devices()


def find_python() -> Iterator[Finding]:
    is_new = sys.version_info >= LEAST_PYTHON
    fact = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding(OK if is_new else FAIL, "Python", fact if is_new else f"{fact}: 3.11 or later is needed")


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def find_packages(has: Callable[[str], bool]) -> Iterator[Finding]:
    """Yield what is missing of the packages that every server needs, and of those that some models need."""
    missing = [name for name in NEEDED if not has(name)]
    if missing:
        yield Finding(FAIL, "packages", f"missing: {', '.join(missing)}: pip install 'radixloop[server]'")
    else:
        yield Finding(OK, "packages", f"transformers {metadata.version('transformers')}, and all that a server needs")
    for name, meaning in EXTRAS.items():
        if not has(name):
            yield Finding(NOTE, name, meaning)


def find_host_memory(num_bytes: int) -> Iterator[Finding]:
    enough = num_bytes >= LEAST_MEMORY
    yield Finding(OK if enough else FAIL, "memory", f"{num_bytes / GIB:.1f} GiB available")
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shared < LEAST_SHM:
        yield Finding(
            NOTE, "/dev/shm", f"{shared / GIB:.2f} GiB free: little for --tp; in a container, --shm-size or --ipc=host"
        )


def find_limits() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding(OK if cores > 1 else NOTE, "CPU", f"{cores} cores{cpu_features()}")
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield Finding(NOTE, "open files", f"{files} at most, and each connection takes one: ulimit -Hn raises it")


def cpu_features() -> str:
    """Return what of this CPU makes products fast, for a line that ends so."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((name for flag, name in known.items() if flag in flags), None)
    return f", {best}" if best else ""


def find_folders() -> Iterator[Finding]:
    """Yield where models and compiled kernels are kept, and whether there is room."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    models = Path(os.environ.get("HF_HOME") or home / "huggingface")
    for subject, folder, least in (("models", models, LEAST_DISK), ("kernels", home / "radixloop", 0)):
        nearest = next(one for one in (folder, *folder.parents) if one.exists())
        free = shutil.disk_usage(nearest).free
        if not os.access(nearest, os.W_OK | os.X_OK):
            yield Finding(NOTE, subject, f"{folder} cannot be written: nothing is kept for the next start")
        elif free < least:
            yield Finding(NOTE, subject, f"{folder} has {free / GIB:.1f} GiB free: little for downloads")
        else:
            yield Finding(OK, subject, f"are kept in {folder}, {free / GIB:.0f} GiB free")


def find_port(host: str, port: int) -> Iterator[Finding]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        yield Finding(NOTE, "port", f"{host}:{port} cannot be had ({error}): choose another with --port")
    else:
        yield Finding(OK, "port", f"{host}:{port} is free")


def find_devices() -> Iterator[Finding]:
    """Yield what torch is and sees, and which kernels there are for it."""
    import torch

    yield Finding(OK, "torch", f"{torch.__version__}{f', CUDA {torch.version.cuda}' if torch.version.cuda else ''}")
    if not torch.cuda.is_available():
        built = "torch sees none: is there a driver?" if torch.version.cuda else "this torch is built for CPUs"
        yield Finding(NOTE, "GPU", f"none ({built}): models run on the CPU")
        yield from find_cpu_kernels()
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        fact = f"{card.name}, sm_{card.major}{card.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield Finding(OK if free > total / 2 else NOTE, f"GPU {number}", fact)
    yield from find_gpu_kernels()


def find_cpu_kernels() -> Iterator[Finding]:
    from kernels.cpp import find_compiler

    compiler = find_compiler()
    if compiler:
        yield Finding(OK, "compiler", f"{' '.join(compiler[:3])}: weights of few bits are multiplied packed")
    else:
        yield Finding(NOTE, "compiler", "no C++ one: weights of few bits are slower or larger (pip install ziglang)")


def find_gpu_kernels() -> Iterator[Finding]:
    from kernels.flashinfer_attention import is_available
    from kernels.nvrtc import has_nvrtc

    if has_module("triton"):
        yield Finding(OK, "Triton", metadata.version("triton"))
    else:
        yield Finding(NOTE, "Triton", "missing: plain torch computes, much slower (pip install 'radixloop[cuda]')")
    nvrtc = has_nvrtc()
    yield Finding(OK if nvrtc else NOTE, "NVRTC", "compiles CUDA kernels" if nvrtc else "none: slower kernels serve")
    has_flashinfer, why = is_available()
    yield Finding(OK if has_flashinfer else NOTE, "FlashInfer", why)

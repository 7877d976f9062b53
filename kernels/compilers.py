"""Processes that compile Triton kernels into its cache on disk, from where the one that wants them reads them.

Half of a compilation is Python's, which threads of one process take turns with. The processes are forked by one that
has imported what they need; none of them uses the GPU, for each kernel comes with the target it is compiled for.
"""

import atexit
import contextlib
import importlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kernels.folders import cache_folder

logger = logging.getLogger(__name__)

READY = b"r"  # what a process sends when it waits for a kernel
MAX_WAIT_S = 120  # for a kernel, or for what they all import: a process that takes longer ends


class Compilers:
    """Processes that compile one kernel each at a time, and end when `close` is called or this process ends."""

    def __init__(self, num_processes: int) -> None:
        """Start them, and return at once. Raises OSError where none can be started."""
        pairs = [socket.socketpair() for _ in range(num_processes)]
        self._connections = [ours for ours, _ in pairs]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}  # else forked
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kernels.compilers", *map(str, descriptors)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | threads,
                pass_fds=descriptors,
                stdin=subprocess.PIPE,  # at whose end they end
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # who wanted a kernel that cannot be compiled tries it again, and says why
                start_new_session=True,  # the terminal's Ctrl-C is for this process
            )
        except OSError:
            self._close_connections()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        self._num_left = num_processes
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()  # None: no process is left
        for connection in self._connections:
            self._idle.put(connection)

    def compile(self, job: bytes) -> None:
        """Wait until a process is free and has compiled `job`, as `job_of` makes it, or until none is left.

        It is not compiled if its process fails.
        """
        connection = self._idle.get()
        if connection is None or _ask(connection, job):
            self._idle.put(connection)
            return
        with self._lock:
            self._num_left -= 1
            if self._num_left == 0:
                self._idle.put(None)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # they have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._close_connections()

    def _close_connections(self) -> None:
        for connection in self._connections:
            connection.close()


def _ask(connection: socket.socket, job: bytes) -> bool:
    """Return whether the process at the other end could take a job and is ready for another one."""
    try:
        if not connection.recv(1):
            return False
        connection.sendall(job)
        return bool(connection.recv(1, socket.MSG_PEEK))  # the next job takes it
    except OSError:
        return False


_compilers: Compilers | None = None
_lock = threading.Lock()


def start_compilers(num_processes: int) -> None:
    """Start this process's ones, unless they have been; one alone would be no faster than this process."""
    global _compilers
    with _lock:
        if _compilers is not None or num_processes < 2:
            return
        try:
            _compilers = Compilers(num_processes)
        except OSError as error:
            logger.info("kernels are compiled in this process alone: %s", error)


@atexit.register
def end_compilers() -> None:
    """End them, if there are any."""
    global _compilers
    with _lock:
        if _compilers is not None:
            _compilers.close()
            _compilers = None
            with contextlib.suppress(OSError):
                cache_folder().mkdir(parents=True, exist_ok=True)  # the next start is not the first one


def job_of(kernel: Any, specialization: str) -> bytes:
    """Return the line that asks for a kernel: Triton's `JitFunctionInfo`, and what its `preload` takes."""
    from triton.runtime import driver  # here: a machine without a GPU need not have it

    target = driver.active.get_current_target()
    fields = [target.backend, target.arch, target.warp_size], kernel.module, kernel.name, specialization
    return json.dumps(fields).encode() + b"\n"


class CompilingThreads:
    """The executor of Triton's `AsyncCompileMode`: a thread asks a process for its kernel, once there are any."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._thread = threading.get_ident()
        self._job: bytes | None = None

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Have Triton name each kernel that this thread asks for, before it submits its compilation."""
        from triton import knobs

        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = self._note
            yield

    def _note(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        if threading.get_ident() == self._thread:
            self._job = job_of(fn, compile["specialization_data"])

    def submit(self, compile_here: Callable[[], Any]) -> Future[Any]:
        job, self._job = self._job, None
        return self._threads.submit(self._compile, job, compile_here)

    def _compile(self, job: bytes | None, compile_here: Callable[[], Any]) -> Any:
        if job is not None and (compilers := _compilers) is not None:
            compilers.compile(job)
        return compile_here()


def work(connection: socket.socket) -> None:
    """Compile what `connection` asks for, until its other end is closed."""
    connection.sendall(READY)
    for line in connection.makefile("rb"):
        signal.alarm(MAX_WAIT_S)
        compile_job(line)
        signal.alarm(0)
        connection.sendall(READY)


def compile_job(job: bytes) -> None:
    """Compile a kernel into Triton's cache, and the C code that launches it, where each kernel has its own."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Target:
        """The driver of a GPU that is elsewhere."""

        def get_current_target(self) -> Any:
            return GPUTarget(*target)

        def get_current_device(self) -> int:
            return 0

    target, module, name, specialization = json.loads(job)
    driver.set_active(Target())
    kernel = getattr(importlib.import_module(module), name).function.preload(specialization)
    if hasattr(nvidia, "make_launcher"):  # before Triton 3.7
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def main(*descriptors: str) -> None:
    """Fork a process for each socket, and end all when the process that started this one has closed stdin or ended."""
    signal.alarm(MAX_WAIT_S)
    for module in ("torch", *(f"kernels.{path.stem}" for path in Path(__file__).parent.glob("triton_*.py"))):
        importlib.import_module(module)  # which takes seconds, once for all
    signal.alarm(0)

    connections = [socket.socket(fileno=int(descriptor)) for descriptor in descriptors]
    for connection in connections:
        if os.fork() == 0:
            for other in connections:
                if other is not connection:
                    other.close()
            work(connection)
            os._exit(0)  # at once: nothing that was imported has anything to put away
    for connection in connections:
        connection.close()
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Whole servers as processes, and what becomes of them and of those they start."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = (sys.executable, "-m", "server")


def descendants(pid: int) -> set[int]:
    children = set[int]()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended meanwhile
            children.update(map(int, task.read_text().split()))
    return children.union(*map(descendants, children))


def state_of(pid: int) -> str:
    """Return a process's state in a letter: R runs or is ready to, S sleeps, Z has ended; see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended may wait forever for a parent that asks."""
    try:
        return state_of(pid) != "Z"
    except OSError:
        return False


def is_rank(pid: int) -> bool:
    try:
        return b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that the system gives to nobody else meanwhile, and where nobody listens.

    It is bound, and does not listen: a server that sets SO_REUSEADDR, as those of asyncio and torch do, may.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def start_server(
    model: Path, log: Path, *options: str, command: Sequence[str] = SERVER, port: int = 0
) -> subprocess.Popen[bytes]:
    words = [*command, "--model-path", str(model), "--device", "cpu", "--port", str(port), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("wb") as output:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Nothing of it is left afterwards."""
    family = {process.pid}
    try:
        yield process
    finally:
        family |= descendants(process.pid)
        for pid in filter(is_alive, family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a server process that is ready."""
    with ending(start_server(model, log, *options)) as process:
        wait_until_ready(process, log)
        yield process


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    wait_until(lambda: process.poll() is not None or "radixloop is ready" in log.read_text(), 120)
    assert process.poll() is None, log.read_text()


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)

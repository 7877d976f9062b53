"""The processes of a server, its replicas and ranks: the host memory each holds and the cores it uses, by /proc."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.reading.protocol import JSON

CHILD = re.compile(r"(?:replica|rank) \d+")  # names that engine/ranks/children.py gives; others are Python's helpers


@dataclass(frozen=True, slots=True)
class Process:
    name: str
    """Where it stands among the others, such as "replica 1, rank 2"."""
    pid: int
    memory_bytes: int
    """Resident memory; what processes share counts for each."""
    cpu_s: float
    """CPU seconds used since its start."""
    state: str
    """The kernel's letter: R runs, S or D waits, T is stopped, Z has ended."""


def find_processes(pid: int, name: str = "server", proc: Path = Path("/proc")) -> Iterator[Process]:
    """Yield a process, then its replicas and ranks on this host. One that ends meanwhile is left out."""
    with contextlib.suppress(OSError):
        words = (proc / f"{pid}/stat").read_text().rpartition(")")[2].split()
        num_pages = int((proc / f"{pid}/statm").read_text().split()[1])
        memory, cpu_s = (
            num_pages * os.sysconf("SC_PAGE_SIZE"),
            (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"),
        )
        yield Process(name, pid, memory, cpu_s, words[0])
        # A child is listed with the thread that started it.
        children = [int(child) for file in proc.glob(f"{pid}/task/*/children") for child in file.read_text().split()]
        for child in sorted(children):
            with contextlib.suppress(OSError):
                own_name = (proc / f"{child}/comm").read_text().strip()
                if CHILD.fullmatch(own_name):
                    path = own_name if name == "server" else f"{name}, {own_name}"
                    yield from find_processes(child, path, proc)


class ProcessWatch:
    """Reports the processes, and the cores that each has used since the report before."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._last: dict[int, tuple[float, float]] = {}  # (when, CPU seconds) by process id

    def report(self) -> list[JSON]:
        now = time.perf_counter()
        processes = list(find_processes(os.getpid(), proc=self._proc))
        last, self._last = self._last, {one.pid: (now, one.cpu_s) for one in processes}
        return [
            {
                "name": one.name,
                "pid": one.pid,
                "memory_bytes": one.memory_bytes,
                "cores": _rate(last.get(one.pid), now, one.cpu_s),
                "is_alive": one.state not in "TZX",
            }
            for one in processes
        ]


def _rate(last: tuple[float, float] | None, now: float, cpu_s: float) -> float | None:
    return None if last is None or now <= last[0] else (cpu_s - last[1]) / (now - last[0])

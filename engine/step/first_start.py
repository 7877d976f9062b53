"""Begin to compile kernels, in processes of their own, before anything else where none were ever compiled."""

import os
from pathlib import Path

from engine.config import EngineConfig
from engine.step.host_memory import available_host_memory
from kernels.compilers import is_first_start, start_compilers

MAX_PROCESSES = 16  # a start has some 90 kernels, each of which takes a core about a second
PROCESS_BYTES = 1 << 30  # what a process takes at most, with the compiler that it runs
DRIVER = Path("/proc/driver/nvidia/version")


def num_processes(num_ranks: int = 1) -> int:
    """Return how many processes each of the ranks on this machine may have compile its kernels."""
    num_cores = len(os.sched_getaffinity(0))
    return min(num_cores // num_ranks, available_host_memory() // num_ranks // PROCESS_BYTES, MAX_PROCESSES)


def start_compilers_at_first_start(num_ranks: int = 1) -> None:
    """Start processes for a rank if all kernels will have to be compiled."""
    if is_first_start():
        start_compilers(num_processes(num_ranks))


def start_compilers_before_torch(config: EngineConfig) -> None:
    """Start this process's ones while it imports torch, where it will have a GPU. Imports nothing itself."""
    if config.dp_size == 1 and config.device != "cpu" and DRIVER.exists():
        start_compilers_at_first_start(config.ranks_per_node)

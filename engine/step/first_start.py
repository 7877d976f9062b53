"""Begin to compile kernels, in processes of their own, before anything else where none were ever compiled."""

import os
from pathlib import Path

from engine.config import EngineConfig
from engine.step.host_memory import available_host_memory
from kernels.compilers import start_compilers
from kernels.folders import is_first_start

MAX_PROCESSES = 16  # a start has some 90 kernels, each of which takes a core about a second
PROCESS_BYTES = 1 << 30  # what a process takes at most, with the compiler that it runs
DRIVER = Path("/proc/driver/nvidia/version")


def num_processes(num_ranks: int = 1) -> int:
    """Return how many processes may compile the kernels of one of the ranks on this machine."""
    num_cores = len(os.sched_getaffinity(0))
    return min(num_cores // num_ranks, available_host_memory() // num_ranks // PROCESS_BYTES, MAX_PROCESSES)


def start_compilers_at_first_start(config: EngineConfig) -> None:
    """Start processes for rank 0's kernels, if it will have a GPU and all of them will have to be compiled.

    Imports nothing that takes time: torch is imported meanwhile. `engine.build` ends them.
    """
    if config.dp_size == 1 and config.device != "cpu" and DRIVER.exists() and is_first_start():
        start_compilers(num_processes(config.ranks_per_node))

"""Keep a rank on the NUMA node of its GPU: its threads, and so the host memory that they are the first to touch.

A copy to or from the other socket's memory crosses the link between sockets, and so does each launch of a kernel. With
a whole host's GPUs at work the ranks of one socket would share that link.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

SYSFS, OWN_THREADS = Path("/sys"), Path("/proc/self/task")


class Place(NamedTuple):
    """A NUMA node, and those of its CPUs that this process may run on."""

    node: int
    cpus: frozenset[int]


def stay_near(device: torch.device) -> None:
    """Move all threads of this process to the CPUs beside a GPU; threads that they start stay there, too.

    Nothing happens on a host with one node, or where none of the GPU's node's CPUs is allowed. Processes that are to be
    elsewhere must have been started before.
    """
    allowed = os.sched_getaffinity(0)
    address = pci_address(device)
    place = None if address is None else find_place(address, allowed)
    if place is None or place.cpus == allowed:
        return
    try:
        move_threads(place.cpus)
    except OSError as error:
        logger.warning("threads stay where they are, %s is on NUMA node %d: %s", device, place.node, error)
    else:
        logger.info("on NUMA node %d with %s: %d of %d CPUs", place.node, device, len(place.cpus), len(allowed))


def pci_address(device: torch.device) -> str | None:
    """Return the name of a GPU's folder in sysfs; None if torch does not say."""
    found: Any = torch.cuda.get_device_properties(device)
    if not hasattr(found, "pci_domain_id"):
        return None
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def find_place(address: str, allowed: Set[int], sysfs: Path = SYSFS) -> Place | None:
    """Return where the device of that PCI address is; None if that is all the same, unknown or not allowed."""
    try:
        if len(parse_numbers((sysfs / "devices/system/node/online").read_text())) < 2:
            return None
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        if node < 0:  # the firmware does not say
            return None
        cpus = parse_numbers((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):  # a sandbox shows less of a host, or other things
        return None
    return Place(node, frozenset(cpus & allowed)) if cpus & allowed else None


def parse_numbers(text: str) -> set[int]:
    """Return the numbers of a list as sysfs has them: "0-3,8,10-11". ValueError if it is none."""
    numbers: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def move_threads(
    cpus: Set[int], threads: Path = OWN_THREADS, move: Callable[[int, Set[int]], None] = os.sched_setaffinity
) -> None:
    """Let the threads that are listed in a folder run on some CPUs alone."""
    for thread in threads.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            move(int(thread.name), cpus)

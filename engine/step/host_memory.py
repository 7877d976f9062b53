"""The host memory that this process may still take: the machine's, and no more than its container's."""

from pathlib import Path

from engine.errors import ModelError

# Of control groups, version 2 and 1, as a container sees its own: limit, usage, and what of the usage is page cache
# that the kernel gives up first.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_host_memory(root: Path = Path("/")) -> int:
    """Return bytes. `root`: where /proc and /sys are."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, *(_room_of_cgroup(root, *names) for names in CGROUPS))
    raise ModelError("/proc/meminfo does not say how much memory is available; give --max-total-tokens")


def _room_of_cgroup(root: Path, limit: str, usage: str, stat: str, cache: str) -> int:
    """Return what a control group may still take; without one, or without a limit, more than any machine has."""
    folder = root / "sys/fs/cgroup"
    try:
        limit_bytes = (folder / limit).read_text().strip()
        if limit_bytes == "max":
            return 1 << 62
        used = int((folder / usage).read_text())
        entries = dict(line.split() for line in (folder / stat).read_text().splitlines())
    except OSError:
        return 1 << 62
    return max(int(limit_bytes) - used + int(entries.get(cache, 0)), 0)

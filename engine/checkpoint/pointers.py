"""Tell what Git LFS leaves in the place of a file that it has not fetched."""

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(file: Path) -> bool:
    """Return whether a file is a note of Git LFS, as a clone has where that is not installed."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(POINTER)) == POINTER
    except OSError:
        return False

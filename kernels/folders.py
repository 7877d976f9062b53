"""Folders of what later starts need not compile or time again. Imports nothing that takes time."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of our own caches; it may not exist before the first start has ended."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radixloop"


def triton_folder() -> Path:
    """Return the folder where Triton keeps kernels; it may not exist yet."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def is_first_start() -> bool:
    """Return whether nothing was ever compiled for a GPU here by Triton, or anything by us."""
    try:
        return not cache_folder().is_dir() or not any(triton_folder().iterdir())
    except FileNotFoundError:
        return True
    except OSError:  # whoever compiles will say
        return False

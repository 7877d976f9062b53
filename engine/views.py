"""Facts about an engine for people who watch it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class RequestView:
    """Show how far a live request has come."""

    rid: str
    is_running: bool
    """Whether it has been admitted; else it waits."""
    num_output_tokens: int
    num_cached_tokens: int
    """Tokens of its prompt that were found in the cache."""


@dataclass(frozen=True, slots=True)
class BranchView:
    """Show one node of the prefix tree."""

    replica: int
    parent: int
    """Place of its parent in the list; -1: it begins at the root."""
    start: int
    """Tokens before it."""
    num_tokens: int
    head: "np.ndarray"
    """Its first tokens, int32."""
    num_users: int
    """Requests that hold it."""
    hits: int
    num_hidden: int
    """Branches behind it that are not in the list."""
    rids: tuple[str, ...]
    """Requests that hold it and none of its branches in the list, some of them."""

"""Describe the values that a model's layers cache for each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KV:
    """Cache keys and values of `heads` heads.

    Equal entries share a buffer, so a property that does not change the layout of a slot does not belong here.
    """

    heads: int
    head_dim: int
    v_dim: int | None = None  # dimensions of a value; None: head_dim
    window: int | None = None  # number of last tokens that the layer attends to; None: all

    @property
    def value_dim(self) -> int:
        """Return the dimensions of a value."""
        return self.head_dim if self.v_dim is None else self.v_dim

    @property
    def values_per_token(self) -> int:
        """Return the number of elements that a layer caches per token."""
        return self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Latent:
    """Cache one compressed vector for all heads, followed by a rotated part (multi-head latent attention)."""

    rank: int
    rope_dim: int

    @property
    def values_per_token(self) -> int:
        """Return the number of elements that a layer caches per token."""
        return self.rank + self.rope_dim


LayerCache = KV | Latent
"""Cache entry of one layer; a model's layout is a tuple of entries, one per layer."""


def has_window(entry: LayerCache) -> bool:
    """Return whether a layer with this entry sees a window of last tokens only."""
    return isinstance(entry, KV) and entry.window is not None


def bytes_per_token(layout: Sequence[LayerCache], dtype: torch.dtype) -> int:
    """Return the bytes of one slot over all layers."""
    return sum(entry.values_per_token for entry in layout) * dtype.itemsize


def buffer_shape(entry: LayerCache, num_layers: int, num_slots: int) -> tuple[int, ...]:
    """Return the shape of the buffer that `num_layers` layers with this entry share."""
    if isinstance(entry, Latent):
        return (num_layers, num_slots, 1, entry.rank + entry.rope_dim)
    if entry.value_dim == entry.head_dim:
        return (num_layers, 2, num_slots, entry.heads, entry.head_dim)
    return (num_layers, num_slots, entry.heads, entry.head_dim + entry.value_dim)

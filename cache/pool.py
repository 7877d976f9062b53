"""Hold the buffers in which all layers cache their tokens."""

import mmap
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from cache.layout import KV, LayerCache, buffer_shape, bytes_per_token, has_window


class KVViews(NamedTuple):
    """View the keys and values of one layer."""

    k: torch.Tensor  # [num_slots, heads, head_dim]
    v: torch.Tensor  # [num_slots, heads, v_dim]


class LatentViews(NamedTuple):
    """View the latent vectors of one layer."""

    latent: torch.Tensor  # [num_slots, 1, rank + rope_dim]


class CachePool:
    """Hold `num_slots` tokens for every layer of a model.

    Layers with equal entries share one buffer, and all buffers use the same slot numbers; or those of layers that see a
    window have fewer slots with numbers of their own, and `window_slots` is the one of each slot. `pool[layer]` returns
    the views of a layer, of the type that its entry in the layout requires.
    """

    def __init__(
        self,
        layout: Sequence[LayerCache],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_window_slots: int | None = None,
    ) -> None:
        """Allocate the buffers. Raises torch.OutOfMemoryError if there is no room.

        num_slots: page 0, where padding writes, included. num_window_slots: likewise, of layers that see a window, if
        they have slots of their own.
        """
        self.num_window_slots = num_window_slots
        self.window_slots: torch.Tensor | None = None  # int32 [num_slots], on the device; each step brings its own
        if num_window_slots is not None:
            self.window_slots = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.layout, self.num_slots, self.dtype = tuple(layout), num_slots, dtype
        self.bytes_per_token = bytes_per_token(self.layout, dtype)
        self._device = device
        self.allocate()

    def allocate(self) -> None:
        """Make the buffers, all zeros: at the start, and again after `release`."""
        # Zeros, not uninitialized: kernels may read slots of padding under a mask, and 0 * NaN is not 0.
        views: dict[int, KVViews | LatentViews] = {}
        self.buffers: list[torch.Tensor] = []
        for entry in dict.fromkeys(self.layout):
            layers = [i for i, other in enumerate(self.layout) if other == entry]
            num_slots = self.num_slots
            if self.num_window_slots is not None and has_window(entry):
                num_slots = self.num_window_slots
            shape = buffer_shape(entry, len(layers), num_slots)
            buffer = _zeros(shape, self.dtype, torch.device(self._device))
            self.buffers.append(buffer)
            views.update(zip(layers, (_views(entry, part) for part in buffer), strict=True))
        self._views = [views[i] for i in range(len(self.layout))]

    def release(self) -> None:
        """Free the memory; its contents are lost."""
        self._views, self.buffers = [], []

    def __getitem__(self, layer: int) -> Any:
        """Return the views of a layer: `KVViews` or `LatentViews`, as its entry in the layout says."""
        return self._views[layer]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. Host memory is taken page by page, as slots are first written: a start writes few of them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _views(entry: LayerCache, buffer: torch.Tensor) -> KVViews | LatentViews:
    if not isinstance(entry, KV):
        return LatentViews(buffer)
    if entry.value_dim == entry.head_dim:
        return KVViews(buffer[0], buffer[1])
    return KVViews(buffer[..., : entry.head_dim], buffer[..., entry.head_dim :])

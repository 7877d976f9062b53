"""The KV buffers of all layers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PoolStats:
    num_slots: int  # page 0, where padding writes, included
    bytes_per_token: int  # all layers, key and value
    num_bytes: int
    dtype: torch.dtype


class KVPool:
    """Keys and values of `num_slots` tokens, `num_layers` deep, in one allocation.

    buffer: [num_layers, 2, num_slots, num_kv_heads, head_dim]; [:, 0] are keys, [:, 1] values.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Raises torch.OutOfMemoryError when the device has no room for it."""
        self.num_slots = num_slots
        self.bytes_per_token = bytes_per_token(num_layers, num_kv_heads, head_dim, dtype)
        self._shape = (num_layers, 2, num_slots, num_kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self.allocate()

    def allocate(self) -> None:
        """Have the buffer, all zeros: at the start, and again after `release`."""
        # Zeros, not empty: kernels may read slots of padding under a mask, and 0 * NaN is not 0.
        self.buffer = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        self._layers = [(layer[0], layer[1]) for layer in self.buffer]

    def release(self) -> None:
        """Give the memory back, with all it holds."""
        self._layers = []
        self.buffer = self.buffer.new_empty(0)

    def k(self, layer: int) -> torch.Tensor:
        """[num_slots, num_kv_heads, head_dim], a view."""
        return self._layers[layer][0]

    def v(self, layer: int) -> torch.Tensor:
        """[num_slots, num_kv_heads, head_dim], a view."""
        return self._layers[layer][1]

    def stats(self) -> PoolStats:
        return PoolStats(self.num_slots, self.bytes_per_token, self.buffer.nbytes, self.buffer.dtype)


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """What one slot costs, over all layers, key and value: to size a pool before there is one."""
    return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize

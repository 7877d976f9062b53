"""Copies of a step's results in pinned host memory. They are there once the stream has come so far."""

import torch

from engine.step.batch import NUM_STAGING_BUFFERS
from kernels.bookkeeping import copy_numbers


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Enqueue a copy of `tensor` into memory of its own. A CPU's tensor is returned as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class TokenBuffers:
    """Memory for the tokens of steps, used in turns: no step allocates any."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        num_buffers = NUM_STAGING_BUFFERS if device.type == "cuda" else 0
        self._buffers = [torch.empty(max_tokens, dtype=torch.int32, pin_memory=True) for _ in range(num_buffers)]
        self._parts: dict[int, list[torch.Tensor]] = {}  # the first so many of each buffer
        self._turn = 0

    def to_host(self, tokens: torch.Tensor) -> torch.Tensor:
        """Copy `tokens` as the function does, into a buffer that is written again NUM_STAGING_BUFFERS calls later."""
        if not self._buffers:
            return tokens
        num_tokens = len(tokens)
        if (parts := self._parts.get(num_tokens)) is None:
            parts = self._parts[num_tokens] = [buffer[:num_tokens] for buffer in self._buffers]
        self._turn = (self._turn + 1) % NUM_STAGING_BUFFERS
        copy_numbers(tokens, parts[self._turn])
        return parts[self._turn]

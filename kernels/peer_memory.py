"""Memory of each GPU of a host that the others can write, which `all_reduce` sends its addends through."""

from dataclasses import dataclass

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_WORDS = 512  # words that a program sums
DATA_BYTES = 4  # data in a word of eight bytes


@dataclass(frozen=True)
class PeerMemory:
    """The buffers of one rank for sums with `size` ranks of one host."""

    rank: int
    size: int
    max_bytes: int  # size of the largest addend
    addresses: torch.Tensor  # int64 [size]: where each rank's buffer lies as this rank sees it
    epochs: torch.Tensor  # int32, sums that each program has done; zeros at first

    @staticmethod
    def buffer_words(size: int, max_bytes: int) -> int:
        """Return the int64 elements of a rank's buffer, zeros at first: all addends to this sum and to the next."""
        return 2 * size * (max_bytes // DATA_BYTES)

    @staticmethod
    def num_programs(max_bytes: int) -> int:
        """Return the programs of the largest sum."""
        return -(-max_bytes // (DATA_BYTES * BLOCK_WORDS))

    def can_sum(self, x: torch.Tensor) -> bool:
        """Return whether `all_reduce` takes x through this memory."""
        return x.dtype in DTYPES and 0 < x.nbytes <= self.max_bytes and x.nbytes % DATA_BYTES == 0 and x.is_contiguous()

"""Sums over the GPUs of one host, through memory of each that the others can write.

A library's ring takes its message round in several hops. Here every rank writes its addend to all others at once and
adds up what has come, in one kernel: a small message then takes the time of one write over the link. Each four bytes
of data travel in one eight-byte word with the number of the sum, so that a word tells by itself whether it has arrived
(as in NCCL's LL protocol): no barrier, no fence. That doubles the bytes, which is why large sums go another way.
"""

import torch

from kernels.peer_memory import PeerMemory


def all_reduce_torch(addends: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the ranks' tensors, added in float32 in the order of ranks and rounded once."""
    total = addends[0].float()
    for addend in addends[1:]:
        total = total + addend.float()
    return total.to(addends[0].dtype)


def all_reduce(x: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    """Return the sum of all ranks' x, to the bit the same on each rank: `all_reduce_torch` of the list of them.

    All ranks must call it, in the same order, with tensors for which `can_sum` holds.
    """
    from kernels.triton_all_reduce import all_reduce_triton  # here: a machine without a GPU need not have triton

    return all_reduce_triton(x, memory)

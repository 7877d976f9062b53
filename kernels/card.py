"""The limits of a GPU, which kernels' sizes and the choice between kernels are made by."""

import functools
from typing import NamedTuple

import torch

OLDEST_BFLOAT16 = (8, 0)  # compute capability
OLDEST_INT8 = (8, 0)  # of products in Triton
OLDEST_E4M3 = (8, 9)  # numbers of float8_e4m3, in tensor cores too
HOPPER = (9, 0)  # clusters of blocks, kernels that begin before the one ahead has ended; later cards have them too
HOPPER_SHARED_BYTES = 227 << 10


class Card(NamedTuple):
    """A GPU, as far as kernels ask."""

    name: str
    capability: tuple[int, int]
    num_sms: int  # multiprocessors
    shared_bytes: int  # shared memory that one block may have

    @property
    def is_hopper(self) -> bool:
        """Return whether it has Hopper's own instructions (wgmma), which no later card has."""
        return self.capability[0] == HOPPER[0]

    @property
    def architecture(self) -> str:
        """Return what compilers call it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def describe(self) -> str:
        """Return a line on what the card's kernels are chosen by."""
        lacks = []
        if self.capability < OLDEST_BFLOAT16:
            lacks.append("bfloat16 in hardware, or our CUDA kernels for weights of few bits")
        if self.capability < OLDEST_E4M3:
            lacks.append("FP8 in hardware")
        if not self.is_hopper:
            lacks.append("our CUDA kernels for Hopper")
        major, minor = self.capability
        limits = (
            f"{self.name}, compute capability {major}.{minor}, {self.shared_bytes >> 10} KiB of shared memory a block"
        )
        return f"{limits}; without {', '.join(lacks)}" if lacks else limits


# Where Triton's interpreter stands in for a GPU: a small one.
INTERPRETER = Card("the interpreter", (8, 6), 2, 99 << 10)


@functools.cache
def card_of(device: torch.device) -> Card:
    """Return the limits of a CUDA device, for others those of the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    shared_bytes: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined] # the stub lacks it
    return Card(found.name, (found.major, found.minor), found.multi_processor_count, shared_bytes)

"""The Triton kernel of `all_reduce`."""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch
from kernels.peer_memory import BLOCK_WORDS, DATA_BYTES, PeerMemory
from kernels.triton_elementwise import launch_options, wait_for_input


def all_reduce_triton(x: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    out = torch.empty_like(x)
    num_words = x.nbytes // DATA_BYTES
    _all_reduce_kernel[(cdiv(num_words, BLOCK_WORDS),)](
        x,
        out,
        memory.addresses,
        memory.epochs,
        num_words,
        RANK=memory.rank,
        SIZE=memory.size,
        CAPACITY=memory.max_bytes // DATA_BYTES,
        BLOCK=BLOCK_WORDS,
        **launch_options(x.device, num_warps=4),
    )
    return out


@fast_launch
@triton.jit(do_not_specialize=["num_words"])
def _all_reduce_kernel(
    x,
    out,
    addresses,
    epochs,
    num_words,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum the same words on all ranks in each program, which counts its sums in `epochs`.

    Programs start in order, so those that wait have their counterparts running or done, however many there are.

    Sums alternate between two halves of the buffers. That is enough: a rank writes for the sum after the next when it
    has the others' addends for the next, and those were sent when they had read everything for this one.
    """
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_word = word < num_words
    own = tl.load(addresses + RANK).to(tl.pointer_type(tl.int64))
    targets = ()
    for distance in tl.static_range(1, SIZE):
        peer = tl.load(addresses + (RANK + distance) % SIZE).to(tl.pointer_type(tl.int64))
        targets = targets + (peer + RANK * CAPACITY + word,)
    wait_for_input(PDL)

    epoch = tl.load(epochs + tl.program_id(0)) + 1
    half = (epoch & 1) * SIZE * CAPACITY
    mine = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=is_word, other=0)
    packed = (epoch.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for i in tl.static_range(SIZE - 1):
        tl.store(targets[i] + half, packed, mask=is_word)

    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(SIZE):
        data = mine
        if source != RANK:
            place = own + half + source * CAPACITY + word
            packed = tl.load(place, mask=is_word, other=0, volatile=True)
            while tl.sum((((packed >> 32).to(tl.int32) != epoch) & is_word).to(tl.int32), axis=0) > 0:
                packed = tl.load(place, mask=is_word, other=0, volatile=True)
            data = packed.to(tl.int32)
        if x.dtype.element_ty == tl.float32:
            low += data.to(tl.float32, bitcast=True)
        else:
            low += data.to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
            high += (data >> 16).to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
    if x.dtype.element_ty == tl.float32:
        total = low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(x.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high_bits = high.to(x.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) << 16
        total = low_bits | high_bits
    tl.store(out.to(tl.pointer_type(tl.int32), bitcast=True) + word, total, mask=is_word)
    tl.store(epochs + tl.program_id(0), epoch)

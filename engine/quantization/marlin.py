"""GPTQ checkpoints that were repacked for Marlin (Frantar and Castro 2024): 4 bits without zeros.

Inputs and outputs lie in tiles of 16 x 16, and four tiles side by side in the order in which the 32 threads of a warp
hold them as an operand of mma.m16n8k16: 8 numbers of a tile a thread, the even ones of these in front.
"""

import torch

from engine.quantization.bits import check_words, unpack
from engine.quantization.packed import Stored
from kernels.quantized import Format, pack_int4
from kernels.weights import ShapeError

TILE, NUM_TILES, NUM_THREADS, PER_THREAD = 16, 4, 32, 8
CHUNK = TILE * TILE * NUM_TILES


def places() -> torch.Tensor:
    """Return int64 [CHUNK]: for each number stored, its place in four tiles, row by row of each tile."""
    thread, tile, stored = torch.meshgrid(
        torch.arange(NUM_THREADS), torch.arange(NUM_TILES), torch.arange(PER_THREAD), indexing="ij"
    )
    held = stored % 4 * 2 + stored // 4  # the even ones lie in front
    row = thread % 4 * 2 + held % 2 + held % 4 // 2 * 8
    column = thread // 4 + held // 4 * 8
    return (tile * TILE * TILE + row * TILE + column).flatten()


def unpack_codes(words: torch.Tensor) -> torch.Tensor:
    """Return the codes [outputs, inputs / 2] of int32 [inputs / 16, 2 outputs]."""
    check_words(words)
    num_outputs = words.shape[1] // 2
    if words.shape[1] % (CHUNK // 8):
        raise ShapeError(f"has {words.shape[1]} words a row, Marlin's layout has a multiple of {CHUNK // 8}")
    stored = unpack(words, 4).view(-1, CHUNK)
    tiles = torch.empty_like(stored)
    tiles[:, places().to(words.device)] = stored
    values = tiles.view(-1, num_outputs // TILE, TILE, TILE).permute(1, 3, 0, 2).reshape(num_outputs, -1)
    return pack_int4(values)


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return [outputs, groups] of [groups, outputs], which lie in the order of a thread's outputs."""
    if scales.shape[0] > 1:
        order = torch.arange(64).view(8, 8).t().flatten()
    else:  # of one group, in that of the results
        order = (torch.arange(4)[:, None] * 2 + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])).flatten()
    if scales.shape[1] % len(order):
        raise ShapeError(f"has {scales.shape[1]} outputs, Marlin's layout has a multiple of {len(order)}")
    stored = scales.reshape(-1, len(order))
    ordered = torch.empty_like(stored)
    ordered[:, order.to(scales.device)] = stored
    return ordered.view(scales.shape).t()


def stored_marlin(group_size: int) -> Stored:
    """Return how a Marlin checkpoint stores a module."""
    return Stored(
        Format("int4", group_size, scale_dtype=torch.float16),
        {"B": ("codes", unpack_codes), "s": ("scale", unpack_scales), "workspace": None},
    )

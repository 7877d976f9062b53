"""Where the codes and scales of `kernels.quantized` lie for `quantized_few.cu`: in tiles, as tensor cores take them.

A tile is 16 rows by 64 columns. Thread 4 r + t of a warp has what its products of step j multiply: of rows r and r + 8
columns 16 j + 8 u + 2 t + v, u and v 0 or 1. Four bits: codes [tiles, columns / 64, 32 threads, 4 steps], int32. Eight
bits: [tiles, columns / 64, 2 halves of the rows, 32 threads, 4 steps, 4 bytes], the bytes by u and v.

Scales of groups, and zeros or minima: [tiles, groups, 8, 2 or 4], of rows r and r + 8 next to each other.
"""

import torch

from kernels.quantized_format import PANEL_ELEMENTS, Format, unpack_codes

TILE, CHUNK = 16, 64


def shift_of(half: int, u: int, v: int, has_table: bool) -> int:
    """Return how far up in a word the 4 bits of a row's half and a column's u and v are.

    Without a table two codes that are multiplied together lie 16 bits apart, so that one instruction decodes both; a
    table is looked up for neighbours.
    """
    return 8 * (half + 2 * u) + 4 * v if has_table else 4 * (half + 2 * u) + 16 * v


def tile_codes(form: Format, codes: torch.Tensor, k: int) -> torch.Tensor:
    """Return codes [n, ...] in tiles, with rows of zeros up to a multiple of 16."""
    num_tiles = -(-len(codes) // TILE)
    shape = (32, 4) if form.code == "int4" else (2, 32, 4, 4)
    dtype = torch.int32 if form.code == "int4" else codes.dtype
    tiled = torch.empty(num_tiles, k // CHUNK, *shape, dtype=dtype, device=codes.device)
    size = max(1, PANEL_ELEMENTS * 16 // (TILE * k))
    for start in range(0, num_tiles, size):
        panel = unpack_codes(form, codes[TILE * start : TILE * (start + size)])
        tiled[start : start + size] = _tile_panel(form, panel)
    return tiled


def _tile_panel(form: Format, codes: torch.Tensor) -> torch.Tensor:
    """Tile one code an element, [rows, k]."""
    num_rows, k = codes.shape
    if missing := -num_rows % TILE:
        codes = torch.cat((codes, codes.new_zeros(missing, k)))
    # [tile, half, r, chunk, j, u, t, v]
    values = codes.view(-1, 2, 8, k // CHUNK, 4, 2, 4, 2)
    if form.code != "int4":
        return values.permute(0, 3, 1, 2, 6, 4, 5, 7).reshape(len(values), k // CHUNK, 2, 32, 4, 4)
    values = values.permute(0, 3, 2, 6, 4, 1, 5, 7).to(torch.int32)  # [tile, chunk, r, t, j, half, u, v]
    words = values.new_zeros(values.shape[:5])
    for half in range(2):
        for u in range(2):
            for v in range(2):
                words |= values[..., half, u, v] << shift_of(half, u, v, form.table is not None)
    return words.view(len(words), k // CHUNK, 32, 4)


def tile_parameters(scale: torch.Tensor, offset: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return scales [n, G], and zeros or minima, in tiles: [tiles, G, 8, 2 or 4]."""
    tensors = [scale] if offset is None else [scale, offset]
    num_groups, missing = scale.shape[1], -len(scale) % TILE
    tiled = [
        torch.cat((tensor.to(dtype), tensor.new_zeros(missing, num_groups, dtype=dtype))).view(-1, 2, 8, num_groups)
        for tensor in tensors
    ]
    return torch.stack(tiled, dim=1).permute(0, 4, 3, 1, 2).reshape(-1, num_groups, 8, 2 * len(tensors)).contiguous()

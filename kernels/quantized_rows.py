"""Rows of a weight of few bits in tiles as plain numbers, for cuBLAS; `quantized_rows.cu` says how."""

import functools

import torch

from kernels.card import card_of
from kernels.launch import address, cdiv, compile_ahead, only_compiles
from kernels.nvrtc import compile_source
from kernels.quantized_few import can_multiply_few
from kernels.quantized_kernel import Args, Kernel, Kind, source_of
from kernels.quantized_layout import CHUNK, TILE

WARPS = 8  # of a block
CHUNK_BYTES = 2048  # of codes that a warp reads at once
SHARED_BYTES = WARPS * TILE * (2 * CHUNK + 16)  # of a block: a chunk's rows of each warp


def fits_rows(kind: Kind, device: torch.device) -> bool:
    """Return whether `write_rows` takes a weight, and is faster than Triton's kernel: groups are small."""
    has_dtype = kind.form.inputs is None and kind.dtype.itemsize == 2  # that products decode to
    return kind.is_tiled and has_dtype and 0 < kind.group_size < CHUNK and can_multiply_few(device)


def write_rows(
    kind: Kind,
    codes: torch.Tensor,
    parameters: torch.Tensor | None,
    scale: torch.Tensor | None,
    num_rows: int,
    out: torch.Tensor,
    first_tile: int,
) -> torch.Tensor:
    """Write rows of W, of which there are `num_rows`, from 16 first_tile on to `out` [rows, k] of the kind's dtype.

    codes, parameters, scale: as `kernels.quantized_layout` lays them.
    """
    if only_compiles():
        compile_ahead(_kernel, kind, out.device)
        return out
    args = Args(
        codes=codes.data_ptr(),
        params=address(parameters),
        scale=address(scale),
        out=out.data_ptr(),
        num_tokens=len(out),
        n=num_rows,
        k=out.shape[1],
        num_groups=1 if parameters is None else parameters.shape[1],
        first=first_tile,
    )
    num_tasks = cdiv(len(out), TILE) * cdiv(out.shape[1] // CHUNK, _chunks(kind))
    _kernel(kind, out.device).launch(cdiv(num_tasks, WARPS), 1, SHARED_BYTES, (args,), out.device)
    return out


def _chunks(kind: Kind) -> int:
    """Return how many chunks of a tile a warp takes."""
    return CHUNK_BYTES // kind.tile_bytes


def source(kind: Kind) -> str:
    """Return the source of the kernel, for NVRTC."""
    return source_of(kind, {"WARPS": WARPS, "CHUNKS": _chunks(kind)}, "quantized_rows.cu")


@functools.cache
def _kernel(kind: Kind, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("quantized_rows", source(kind), card_of(device).architecture)
        return Kernel("quantized_rows", cubin, 32 * WARPS, device)

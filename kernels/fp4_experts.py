"""Products of pairs sorted by expert with weights in MXFP4, in CUDA, from Hopper on; `fp4_experts.cu` says how.

Triton decodes codes to float32 and moves them between threads to where tensor cores want them. Here each thread decodes
what its part of the operand consists of.
"""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels.card import HOPPER, card_of
from kernels.launch import address, cdiv, only_compiles
from kernels.nvrtc import compile_source, compile_sources, has_nvrtc
from kernels.quantized_kernel import Kernel

if TYPE_CHECKING:
    from kernels.triton_experts import Codes, Sorted

GROUP = 32  # inputs that share a scale
ACTS = {None: 0, "silu": 1, "clamped_swiglu": 2}


class Tiling(NamedTuple):
    """Say how a product is cut: see `fp4_experts.cu`."""

    tokens: int
    tiles: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block."""
        return self.stages * (self.warps * self.tiles * 16 * 64 + 8 * self.tokens * 256)


# By pairs of a tile, measured on an H200 with 32 experts of 2,880 inputs and as many rows.
TILINGS = {8: Tiling(1, 2, 4, 4), 16: Tiling(2, 2, 4, 4), 32: Tiling(4, 2, 4, 4), 64: Tiling(8, 2, 4, 3)}
# By most pairs that an expert has on average.
TILE_HEIGHTS = {5: 8, 12: 16, 48: 32}
HIGHEST_TILE = 64
MAX_SINGLE_PAIRS = 4  # that are rather taken one by one


class Args(ctypes.Structure):
    """The kernel's arguments; `fp4_experts.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "codes", "scales", "x", "bias", "order", "ends", "tile_ends", "out",
        )),
        *((name, ctypes.c_int) for name in ("num_experts", "n", "rows", "k", "per_input", "num_blocks")),
    )  # fmt: skip


def can_multiply(codes: "Codes", dtype: torch.dtype) -> bool:
    """Return whether products of a stack with inputs of `dtype` have a kernel here."""
    return (
        codes.code == "fp4"
        and codes.group_size == GROUP
        and codes.k % GROUP == 0
        and codes.scale is not None
        and codes.scale.dtype == dtype == torch.bfloat16
        and card_of(codes.data.device).capability >= HOPPER
        and has_nvrtc()
    )


def tile_height(num_pairs: int, num_experts: int) -> int | None:
    """Return how many pairs of an expert a step's tiles have; None: pairs are taken one by one."""
    if num_pairs <= MAX_SINGLE_PAIRS:
        return None
    average = num_pairs / num_experts
    return next((height for most, height in TILE_HEIGHTS.items() if average <= most), HIGHEST_TILE)


def multiply(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: "Codes",
    num_experts: int,
    act: str | None,
    by_expert: "Sorted",
    bias: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Return what `kernels.triton_experts.expert_products_triton` does, for tiles of pairs."""
    num_pairs, rows = ids.numel(), weight.data.shape[0] // num_experts
    n = rows // 2 if act else rows
    tiling = tiling or TILINGS[by_expert.block_m]
    out = torch.empty(num_pairs, n, dtype=x.dtype, device=x.device)
    if only_compiles():
        _prepare(act, card_of(x.device).architecture)
        return out
    num_blocks = cdiv(n, 16 * tiling.warps * (tiling.tiles // 2 if act else tiling.tiles))
    num_tiles = min(num_pairs, cdiv(num_pairs, by_expert.block_m) + num_experts)
    args = Args(
        weight.data.data_ptr(), address(weight.scale), x.data_ptr(), address(bias), by_expert.order.data_ptr(),
        by_expert.ends.data_ptr(), by_expert.tile_ends.data_ptr(), out.data_ptr(),
        num_experts, n, rows, weight.k, num_pairs // len(x), num_blocks,
    )  # fmt: skip
    kernel = _kernel(tiling, act, x.device)
    kernel.launch(num_blocks * num_tiles, 1, tiling.shared_bytes, (args,), x.device)
    return out


@functools.cache
def _prepare(act: str | None, architecture: str) -> None:
    """Compile the kernels of all tiles, at once."""
    compile_sources("fp4_experts", [source(tiling, act) for tiling in TILINGS.values()], architecture)


def source(tiling: Tiling, act: str | None) -> str:
    """Return the source of a kernel, for NVRTC."""
    defines = {
        "TOKENS": tiling.tokens, "TILES": tiling.tiles, "WARPS": tiling.warps, "STAGES": tiling.stages, "ACT": ACTS[act]
    }  # fmt: skip
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join([*lines, (Path(__file__).parent / "fp4_experts.cu").read_text()])


@functools.cache
def _kernel(tiling: Tiling, act: str | None, device: torch.device) -> Kernel:
    architecture = card_of(device).architecture
    _prepare(act, architecture)
    with torch.cuda.device(device):
        cubin = compile_source("fp4_experts", source(tiling, act), architecture)
        return Kernel("fp4_experts", cubin, 32 * tiling.warps, device)

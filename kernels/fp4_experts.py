"""Products of pairs sorted by expert with weights in MXFP4, in CUDA for Hopper.

Triton decodes codes to float32 and moves them between threads to where tensor cores want them. Here each thread decodes
what its part of the operand consists of: `fp4_experts.cu` and, for the tiles of prompts, `fp4_prompts.cu` say how.
"""

import ctypes
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels.hopper import ARCHITECTURE, is_available
from kernels.launch import address, cdiv, only_compiles
from kernels.nvrtc import compile_source, compile_sources, joined
from kernels.quantized_kernel import Kernel

if TYPE_CHECKING:
    from kernels.triton_experts import Codes, Sorted

GROUP = 32  # inputs that share a scale
CHUNK = 128  # inputs of a row that are copied together
ACTS = {None: 0, "silu": 1, "clamped_swiglu": 2}


class Tiling(NamedTuple):
    """Say how a product is cut: see `fp4_experts.cu`."""

    tokens: int
    tiles: int
    warps: int
    stages: int

    @property
    def num_threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.warps

    @property
    def num_rows(self) -> int:
        """Return the rows of a block: of gate and up together, if there is an activation."""
        return 16 * self.warps * self.tiles

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block."""
        return self.stages * (64 * self.num_rows + 8 * self.tokens * 2 * CHUNK)

    def source(self, act: str | None) -> str:
        """Return the source of a kernel, for NVRTC."""
        fields = {name.upper(): value for name, value in self._asdict().items()}
        return joined({**fields, "ACT": ACTS[act]}, "fp4_parts.cu", "fp4_experts.cu")


class PromptTiling(NamedTuple):
    """Say how a product is cut: see `fp4_prompts.cu`."""

    tokens: int
    warpgroups: int
    stages: int
    blocks: int  # that a multiprocessor has at once

    @property
    def num_threads(self) -> int:
        """Return the threads of a block."""
        return 128 * self.warpgroups

    @property
    def num_rows(self) -> int:
        """Return the rows of a block: of gate and up together, if there is an activation."""
        return 128 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block."""
        return self.stages * (64 * self.num_rows + self.tokens * 2 * CHUNK)

    def source(self, act: str | None) -> str:
        """Return the source of a kernel, for NVRTC."""
        sums = self.tokens // 2  # registers of a thread
        operands = {
            "WGMMA_TYPE": f"m64n{self.tokens}k16.f32.bf16.bf16",
            "WGMMA_D": ", ".join(f"%{i}" for i in range(sums)),
            "WGMMA_A": ", ".join(f"%{i}" for i in range(sums, sums + 4)),
            "WGMMA_X": f"%{sums + 4}",
            "WGMMA_ADD": f"%{sums + 5}",
        }
        defines: dict[str, object] = {name: f'"{text}"' for name, text in operands.items()}
        defines["WGMMA_SUMS"] = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
        fields = {name.upper(): value for name, value in self._asdict().items()}
        return joined({**fields, "ACT": ACTS[act], **defines}, "hopper.cu", "fp4_parts.cu", "fp4_prompts.cu")


# By pairs of a tile, measured on an H200 with 32 experts of 2,880 inputs and as many rows. Where a multiprocessor has
# room for three small blocks these are faster than a large one: while one waits, another decodes.
TILINGS: dict[int, Tiling | PromptTiling] = {
    8: Tiling(1, 2, 4, 4),
    16: PromptTiling(16, 1, 4, 4),
    32: PromptTiling(32, 1, 4, 3),
    48: PromptTiling(48, 1, 3, 3),
    64: PromptTiling(64, 1, 3, 3),
    80: PromptTiling(80, 2, 4, 1),
    96: PromptTiling(96, 2, 4, 1),
}
# By most pairs that an expert has on average: few have so many more that they need a second tile.
TILE_HEIGHTS = {5: 8, 12: 16, 20: 32, 36: 48, 50: 64, 66: 80}
HIGHEST_TILE = 96
MAX_SINGLE_PAIRS = 4  # that are rather taken one by one


class Args(ctypes.Structure):
    """The kernel's arguments; `fp4_experts.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "codes", "scales", "x", "bias", "order", "ends", "tile_ends", "out",
        )),
        *((name, ctypes.c_int) for name in (
            "num_experts", "n", "rows", "k", "per_input", "num_blocks", "x_width", "out_width",
        )),
    )  # fmt: skip


def can_multiply(codes: "Codes", dtype: torch.dtype) -> bool:
    """Return whether products of a stack with inputs of `dtype` have a kernel here."""
    return (
        codes.code == "fp4"
        and codes.group_size == GROUP
        and codes.k % GROUP == 0
        and codes.scale is not None
        and codes.scale.dtype == dtype == torch.bfloat16
        and is_available(codes.data.device)
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
    *,
    is_input: bool = False,
) -> torch.Tensor:
    """Return what `kernels.triton_experts.expert_products_triton` does, for tiles of pairs.

    is_input: of the next product with the same pairs, and of nothing else: rows may then be wider, in the order in
    which it wants them.
    """
    num_pairs, rows = ids.numel(), weight.data.shape[0] // num_experts
    n = rows // 2 if act else rows
    tiling = TILINGS[by_expert.block_m]
    out_width = 0
    if isinstance(tiling, PromptTiling):
        from kernels.triton_experts import permuted_triton  # here: a machine without a GPU need not have triton

        x = permuted_triton(x) if x.shape[1] == weight.k else x
        out_width = (n // CHUNK + 1) * CHUNK if is_input else 0  # never n, so that it tells the order
    out = torch.empty(num_pairs, out_width or n, dtype=x.dtype, device=x.device)
    if only_compiles():  # nobody has sorted the pairs
        _prepare(act)
        return out
    num_blocks = cdiv(rows, tiling.num_rows)
    num_tiles = min(num_pairs, cdiv(num_pairs, by_expert.block_m) + num_experts)
    args = Args(
        weight.data.data_ptr(), address(weight.scale), x.data_ptr(), address(bias), by_expert.order.data_ptr(),
        by_expert.ends.data_ptr(), by_expert.tile_ends.data_ptr(), out.data_ptr(),
        num_experts, n, rows, weight.k, num_pairs // len(x), num_blocks, x.shape[1], out_width,
    )  # fmt: skip
    kernel = _kernel(tiling, act, x.device)
    kernel.launch(num_blocks * num_tiles, 1, tiling.shared_bytes, (args,), x.device)
    return out


@functools.cache
def _prepare(act: str | None) -> None:
    """Compile the kernels of all tiles, at once."""
    compile_sources("fp4_experts", [tiling.source(act) for tiling in TILINGS.values()], ARCHITECTURE)


@functools.cache
def _kernel(tiling: Tiling | PromptTiling, act: str | None, device: torch.device) -> Kernel:
    _prepare(act)
    name = "fp4_prompts" if isinstance(tiling, PromptTiling) else "fp4_experts"
    with torch.cuda.device(device):
        cubin = compile_source("fp4_experts", tiling.source(act), ARCHITECTURE)
        return Kernel(name, cubin, tiling.num_threads, device)

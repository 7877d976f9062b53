"""act(x @ gate.T) * (x @ up.T) in one kernel for Hopper, for more tokens than `triton_gemm` takes.

A third faster than cuBLAS and an activation's pass for a few hundred tokens of a small model, 5 to 15 % for Llama-3-8B:
gate and up never reach memory, tiles are cut so that they fill the multiprocessors, and the weights are on their way
before the kernel ahead has ended. `gated_gemm.cu` is compiled by NVRTC, which comes with torch, and kept on disk.
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from kernels.card import HOPPER_SHARED_BYTES
from kernels.hopper import ARCHITECTURE, is_available, kind_of, tensor_map
from kernels.hopper import source as hopper_source
from kernels.launch import cdiv, compile_ahead, num_sms, only_compiles
from kernels.nvrtc import check, compile_source

ROWS, DEPTH = 128, 64  # rows of a tile, and columns of x and weight that it reads at a time
TILE_COLUMNS = (128, 112, 96, 64, 48, 32)
COLUMN_OVERHEAD = 17  # fixed cost of a tile, in columns
MAX_ROW_TILES = 64  # with more of them, all tiles keep the multiprocessors equally busy
STAGING_BYTES = 8 * 16 * 144
BARRIER_BYTES = 256
MAX_STAGES = 8
NUM_THREADS = 384
ACTS = {"silu": "SILU", "gelu_tanh": "GELU_TANH"}


class Tile(NamedTuple):
    """A block's part of the result: 128 rows by `columns`. Pairs of blocks share their weights, or their rows of x."""

    columns: int
    shares_weights: bool

    @property
    def num_stages(self) -> int:
        return min(MAX_STAGES, (HOPPER_SHARED_BYTES - STAGING_BYTES - BARRIER_BYTES) // self._stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.num_stages * self._stage_bytes + STAGING_BYTES + BARRIER_BYTES

    @property
    def _stage_bytes(self) -> int:
        return 2 * DEPTH * (ROWS + 2 * self.columns)

    def num_pairs(self, num_row_tiles: int, n: int) -> int:
        if self.shares_weights:
            return cdiv(num_row_tiles, 2) * (n // self.columns)
        return num_row_tiles * (n // (2 * self.columns))


@functools.cache
def choose_tile(num_row_tiles: int, n: int, num_sms: int) -> Tile | None:
    """Choose the tile whose rounds over all multiprocessors take the least time; None if none divides n."""
    tiles = [Tile(columns, shares) for columns in TILE_COLUMNS for shares in (True, False)]
    tiles = [tile for tile in tiles if n % (tile.columns if tile.shares_weights else 2 * tile.columns) == 0]
    num_row_tiles = min(num_row_tiles, MAX_ROW_TILES)

    def cost(tile: Tile) -> int:
        return cdiv(tile.num_pairs(num_row_tiles, n), num_sms // 2) * (tile.columns + COLUMN_OVERHEAD)

    return min(tiles, key=cost, default=None)


@functools.cache
def most_columns(num_row_tiles: int, n: int, num_sms: int) -> int | None:
    """Return how many of a result's `n` columns the busiest multiprocessor computes; None if no tile divides them."""
    tile = choose_tile(num_row_tiles, n, num_sms)
    return tile and cdiv(tile.num_pairs(num_row_tiles, n), num_sms // 2) * tile.columns


def can_gated_gemm(x: torch.Tensor, weight: torch.Tensor, act: str) -> bool:
    """Return whether `gated_gemm` takes these: a Hopper GPU, 16-bit floats, contiguous, K a multiple of 64, N of 64."""
    return (
        is_available(x.device)
        and x.dtype == weight.dtype in (torch.bfloat16, torch.float16)
        and act in ACTS
        and x.shape[1] % DEPTH == 0
        and weight.shape[0] % (4 * min(TILE_COLUMNS)) == 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.shape[0] > 0
    )


def gated_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    act: str,
    tile: Tile | None = None,
    *,
    out: torch.Tensor | None = None,
    num_free_sms: int = 0,
) -> torch.Tensor:
    """Return act(x @ gate.T) * (x @ up.T) of x [T, K] and weight [2N, K]: [T, N], written into `out` if given.

    Sums and activation are in fp32, rounded once.

    num_free_sms: multiprocessors, an even number, to leave to the next kernel, which may run beside this one if it
    waits for it only at its end (`triton_decode.decode`). This one begins when all before it has ended.
    """
    num_rows, k = x.shape
    n = weight.shape[0] // 2
    num_row_tiles = cdiv(num_rows, ROWS)
    num_blocks = num_sms(x.device) - num_free_sms
    if only_compiles():
        compile_ahead(_prepare, x.dtype, act, n, num_blocks, x.device)
        return x.new_empty(num_rows, n) if out is None else out
    _prepare(x.dtype, act, n, num_blocks, x.device)
    tile = tile or choose_tile(num_row_tiles, n, num_blocks)
    assert tile is not None, f"no tile divides {n} columns"
    if out is None:
        out = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    x_map = _tensor_map(x.data_ptr(), num_rows, k, ROWS if tile.shares_weights else ROWS // 2, x.dtype)
    w_map = _tensor_map(weight.data_ptr(), 2 * n, k, tile.columns, x.dtype)
    num_pairs = min(tile.num_pairs(num_row_tiles, n), num_blocks // 2)
    kernel = _kernel(x.dtype, act, tile, x.device)
    kernel.launch(2 * num_pairs, x_map, w_map, out, num_rows, n, k, is_early=not num_free_sms)
    return out


@functools.cache
def _prepare(dtype: torch.dtype, act: str, n: int, num_blocks: int, device: torch.device) -> None:
    """Compile every tile that `choose_tile` may choose, so that no later step waits for a compiler."""
    chosen = {choose_tile(rows, n, num_blocks) for rows in range(1, MAX_ROW_TILES + 1)}
    tiles = [tile for tile in chosen if tile]
    with ThreadPoolExecutor(len(tiles)) as threads:
        list(threads.map(lambda tile: _compile(source(dtype, act, tile)), tiles))
    for tile in tiles:
        _kernel(dtype, act, tile, device)


@functools.cache
def _kernel(dtype: torch.dtype, act: str, tile: Tile, device: torch.device) -> "_Kernel":
    with torch.cuda.device(device):
        return _Kernel(_compile(source(dtype, act, tile)), tile.shared_bytes)


def source(dtype: torch.dtype, act: str, tile: Tile) -> str:
    """Return the source of a tile's kernel, for NVRTC."""
    short = "bf16" if dtype == torch.bfloat16 else "f16"
    sums = range(tile.columns)  # registers of a thread
    defines = {
        "SILU": 1,
        "GELU_TANH": 2,
        "ACT": ACTS[act],
        "COLUMNS": tile.columns,
        "SHARE_WEIGHTS": int(tile.shares_weights),
        "STAGES": tile.num_stages,
        "WGMMA_TYPE": f'"m64n{2 * tile.columns}k16.f32.{short}.{short}"',
        "OUT_TYPE": f'"{short}"',
        "WGMMA_D": '"' + ", ".join(f"%{i}" for i in sums) + '"',
        "WGMMA_X": f'"%{len(sums)}"',
        "WGMMA_W": f'"%{len(sums) + 1}"',
        "WGMMA_ADD": f'"%{len(sums) + 2}"',
        "WGMMA_SUMS": ", ".join(f'"+f"(d[{i}])' for i in sums),
    }
    return hopper_source("gated_gemm.cu", defines)


def _compile(source: str) -> bytes:
    return compile_source("gated_gemm", source, ARCHITECTURE)


class _Kernel:
    """A kernel that is compiled and loaded, to be launched on the current stream."""

    def __init__(self, cubin: bytes, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        module = check(driver.cuModuleLoadData(cubin))
        self._function = check(driver.cuModuleGetFunction(module, b"gated_gemm"))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        self._config = driver.CUlaunchConfig()
        self._config.gridDimY = self._config.gridDimZ = self._config.blockDimY = self._config.blockDimZ = 1
        self._config.blockDimX = NUM_THREADS
        self._config.sharedMemBytes = shared_bytes
        self._config.attrs = [early]

    def launch(
        self, num_blocks: int, x_map: Any, w_map: Any, out: torch.Tensor, num_rows: int, n: int, k: int, is_early: bool
    ) -> None:
        """Launch the kernel. is_early: it may start, and load weights, before the kernel ahead has ended."""
        self._config.numAttrs = int(is_early)
        self._config.gridDimX = num_blocks
        self._config.hStream = torch.cuda.current_stream(out.device).cuda_stream
        values = (ctypes.c_void_p(out.data_ptr()), ctypes.c_int(num_rows), ctypes.c_int(n), ctypes.c_int(k))
        pointers = (ctypes.c_void_p * 6)(x_map.getPtr(), w_map.getPtr(), *map(ctypes.addressof, values))
        check(self._driver.cuLaunchKernelEx(self._config, self._function, ctypes.addressof(pointers), 0))


@functools.lru_cache(4096)
def _tensor_map(pointer: int, num_rows: int, k: int, box_rows: int, dtype: torch.dtype) -> Any:
    """Describe a contiguous matrix to the tensor memory accelerator, which reads boxes [box_rows, DEPTH] of it.

    Past its end it reads zeros.
    """
    return tensor_map(kind_of(dtype), pointer, (k, num_rows), (2 * k,), (DEPTH, box_rows))

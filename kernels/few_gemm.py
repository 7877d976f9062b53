"""Products of a weight of 16-bit floats and a few tokens for Hopper, where it beats `triton_skinny` and cuBLAS.

As much of the weight as shared memory has room for is always on its way. `few_gemm.cu` is compiled by NVRTC, which
comes with torch, and kept on disk.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from kernels.hopper import ARCHITECTURE, is_available, kind_of, tensor_map
from kernels.launch import cdiv, compile_ahead, num_sms, only_compiles
from kernels.nvrtc import compile_source, joined
from kernels.quantized_kernel import Kernel

DEPTH = 64  # columns of x and weight in a slab
MOST_TOKENS, MOST_GATED_TOKENS = 128, 64
SOME_TOKENS = 32  # up to which inputs hardly count beside weights
LEAST_COLUMNS = 1024  # of the result
TOKENS = (8, 16, 32, 48, 64)  # that kernels are compiled for
ACTS = {None: "NONE", "silu": "SILU", "gelu_tanh": "GELU_TANH"}
GRANULE = 8  # rows of a weight
TILE_COLUMNS = {False: 256, True: 128}  # at most, by whether there are gates
# Columns from which on tiles are small: of many the number of rounds hardly matters. So a head of 151,936 by 2,048
# takes 151 µs for 16 tokens, one of 128,256 by 4,096 253 (H200).
MANY_COLUMNS, MANY_TILE_COLUMNS = 32768, 64
ROUND_OVERHEAD = 4  # of another round of tiles, in rows
STAGE_BYTES = 16 << 10  # of a weight, about
BLOCK_BYTES = 220 << 10  # of shared memory
MOST_SLABS = 4
MOST_STAGES = 16
BARRIER_BYTES = 16  # of a stage
NUM_THREADS = 160


class FewConfig(NamedTuple):
    """Say how `few_gemm` cuts its work: tiles are `columns` rows of the weight, stages `slabs` times 64 columns."""

    columns: int
    slabs: int
    stages: int
    share: int = 1  # tiles of tokens of a cluster, whose blocks copy weights for each other


class Args(ctypes.Structure):
    """The kernel's arguments; `few_gemm.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "out")),
        *((name, ctypes.c_int) for name in ("num_tokens", "n", "k", "is_out_float")),
    )


@functools.cache
def few_config(n: int, k: int, tokens: int, is_gated: bool, num_sms: int, num_tiles: int = 1) -> FewConfig:
    """Choose tiles that leave the fewest multiprocessors idle.

    For a result of `n` columns and `num_tiles` times `tokens`: more than one where these are the most that a tile has.
    """

    def cost(columns: int) -> tuple[int, int]:
        return cdiv(cdiv(n, columns), num_sms // num_tiles) * (columns + ROUND_OVERHEAD), -columns

    most = TILE_COLUMNS[is_gated] if n <= MANY_COLUMNS else MANY_TILE_COLUMNS
    columns = min(range(GRANULE, most + 1, GRANULE), key=cost)
    rows = 2 * columns if is_gated else columns
    slabs = max(1, min(MOST_SLABS, STAGE_BYTES // (2 * DEPTH * rows), k // DEPTH))
    share = 1
    if tokens > SOME_TOKENS:
        slabs = min(2, k // DEPTH) if num_tiles > 1 else min(slabs, 2) if rows > 2 * GRANULE else slabs
        share = num_tiles if slabs % num_tiles == 0 else 1
    one = FewConfig(columns, slabs, 1, share)
    more = (BLOCK_BYTES - shared_bytes(tokens, one, is_gated)) // (stage_bytes(tokens, one, is_gated) + BARRIER_BYTES)
    return one._replace(stages=min(MOST_STAGES, max(2, 1 + more)))


def tile_tokens(num_tokens: int) -> int:
    """Return how many tokens the tiles have for `num_tokens`."""
    return next((tokens for tokens in TOKENS if num_tokens <= tokens), TOKENS[-1])


def stage_bytes(tokens: int, config: FewConfig, is_gated: bool) -> int:
    """Return the shared memory of a stage."""
    return 2 * DEPTH * config.slabs * (tokens + config.columns * (2 if is_gated else 1))


def shared_bytes(tokens: int, config: FewConfig, is_gated: bool) -> int:
    """Return the shared memory of a block; of a slab of inputs the tensor cores read 64 rows."""
    stage = stage_bytes(tokens, config, is_gated)
    read = 2 * DEPTH * ((config.slabs - 1) * tokens + 64)
    return (config.stages - 1) * stage + max(read, stage) + BARRIER_BYTES * config.stages


def can_few_gemm(
    x: torch.Tensor, weight: torch.Tensor, act: str | None = None, residual: torch.Tensor | None = None
) -> bool:
    """Return whether `few_gemm` takes these, and is faster than others.

    On a Hopper GPU it takes 2 to 128 tokens of 16-bit floats, contiguous, K of 64s; up to 64 with gates, 32 of a head.
    A result of few columns has too few tiles.
    """
    n = weight.shape[0] // 2 if act else weight.shape[0]
    return (
        1 < x.shape[0] <= (SOME_TOKENS if n > MANY_COLUMNS else MOST_TOKENS if act is None else MOST_GATED_TOKENS)
        and is_available(x.device)
        and x.dtype == weight.dtype in (torch.bfloat16, torch.float16)
        and act in ACTS
        and x.shape[1] % DEPTH == 0
        and n % GRANULE == 0
        and n >= LEAST_COLUMNS
        and x.is_contiguous()
        and weight.is_contiguous()
        and (residual is None or (residual.dtype == x.dtype and residual.is_contiguous()))
    )


@functools.cache
def most_columns(n: int, k: int, num_sms: int) -> int:
    """Return how many columns of act(gate) * up [T, n] the busiest multiprocessor computes."""
    columns = few_config(n, k, TOKENS[0], True, num_sms).columns
    return cdiv(cdiv(n, columns), num_sms) * columns


def few_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: FewConfig | None = None,
) -> torch.Tensor:
    """Return x @ weight.T + bias [T, N] of tokens x [T, K] and weight [N, K] that `can_few_gemm` takes.

    act, residual, out_dtype: as of `kernels.triton_skinny.skinny_gemm`. Results do not depend on `config` but for
    rounding.
    """
    num_tokens, k = x.shape
    num_rows = weight.shape[0]
    n = num_rows // 2 if act else num_rows
    if residual is not None:
        out = residual
    elif out is None:
        out = torch.empty(num_tokens, n, dtype=out_dtype or x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype)
    tokens, is_gated = tile_tokens(num_tokens), act is not None
    config = config or few_config(n, k, tokens, is_gated, num_sms(x.device), cdiv(num_tokens, tokens))
    text = source(x.dtype, act, tokens, config)
    if only_compiles():
        compile_ahead(compile_source, "few_gemm", text, ARCHITECTURE)
        return out
    args = Args(
        bias=_address(bias),
        residual=_address(residual),
        out=out.data_ptr(),
        num_tokens=num_tokens,
        n=num_rows,
        k=k,
        is_out_float=out.dtype == torch.float32,
    )
    x_map = tensor_map_of(x.data_ptr(), num_tokens, k, tokens, config.slabs, x.dtype)
    w_map = tensor_map_of(weight.data_ptr(), num_rows, k, config.columns, config.slabs // config.share, x.dtype)
    num_tiles = cdiv(n, config.columns) * cdiv(num_tokens, tokens * config.share)
    num_blocks = min(num_sms(x.device) // config.share, num_tiles) * config.share
    kernel = _kernel(text, x.device)
    kernel.launch(num_blocks, config.share, shared_bytes(tokens, config, is_gated), (x_map, w_map, args), x.device)
    return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def source(dtype: torch.dtype, act: str | None, tokens: int, config: FewConfig) -> str:
    """Return the source of a kernel, for NVRTC."""
    short = "bf16" if dtype == torch.bfloat16 else "f16"
    sums = config.columns // 2  # registers of a thread
    defines = {
        "NONE": 0,
        "SILU": 1,
        "GELU_TANH": 2,
        "ACT": ACTS[act],
        "TOKENS": tokens,
        "COLUMNS": config.columns,
        "SLABS": config.slabs,
        "STAGES": config.stages,
        "SHARE": config.share,
        "IS_HALF": int(dtype == torch.float16),
        "WGMMA_TYPE": f'"m64n{config.columns}k16.f32.{short}.{short}"',
        "WGMMA_D": '"' + ", ".join(f"%{i}" for i in range(sums)) + '"',
        "WGMMA_X": f'"%{sums}"',
        "WGMMA_W": f'"%{sums + 1}"',
        "WGMMA_ADD": f'"%{sums + 2}"',
        "WGMMA_SUMS": ", ".join(f'"+f"(d[{i}])' for i in range(sums)),
    }
    return joined(defines, "hopper.cu", "few_gemm.cu")


@functools.cache
def _kernel(text: str, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("few_gemm", text, ARCHITECTURE)
        return Kernel("few_gemm", cubin, NUM_THREADS, device)


@functools.lru_cache(8192)
def tensor_map_of(pointer: int, num_rows: int, k: int, box_rows: int, box_slabs: int, dtype: torch.dtype) -> Any:
    """Describe a contiguous matrix to the tensor memory accelerator; boxes of it are [box_slabs, box_rows, DEPTH].

    Slabs are DEPTH columns each. Past its end it reads zeros.
    """
    sizes, strides = (DEPTH, num_rows, k // DEPTH), (2 * k, 2 * DEPTH)
    return tensor_map(kind_of(dtype), pointer, sizes, strides, (DEPTH, box_rows, box_slabs))

"""Attention of single tokens straight from their products, in CUDA for Hopper: see `one_token_heads.cu`."""

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from kernels.attention_batch import AttentionBatch, HeadRotation
from kernels.hopper import ARCHITECTURE, is_available
from kernels.launch import address, compile_ahead, only_compiles
from kernels.nvrtc import compile_source, joined
from kernels.quantized_kernel import Kernel

HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 8  # query heads of a KV head
# A cluster shares out a context: behind a longer one `long_token` is faster, with fewer heads Triton's kernel.
MIN_KV_HEADS, LONG_CONTEXT = 4, 4096
SPLIT = 8  # blocks of a cluster, which share out a request's tokens
WARPS = 8
LOG2_E = 1.4426950408889634
HEADS_FILES = ("one_token_parts.cu", "token_heads_parts.cu")  # of kernels whose products are the tensor cores'


class Args(ctypes.Structure):
    """The kernels' arguments; `one_token_parts.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "q_norm", "k_norm", "k_cache", "v_cache", "out", "cos_sin", "positions", "seq_lens", "rows",
            "slot_table", "slot_map", "sinks", "parts", "arrivals",
        )),
        *((name, ctypes.c_longlong) for name in (
            "qkv_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride", "table_stride",
        )),
        *((name, ctypes.c_int) for name in ("num_kv_heads", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "eps")),
    )  # fmt: skip


class Variant(NamedTuple):
    """Say what a kernel is compiled for."""

    head_dim: int
    group: int
    half: int  # elements of a head that rotate with as many others
    dtype: torch.dtype
    window: int = 0  # 0: none, 1: the last tokens, 2: chunks
    has_softcap: bool = False
    has_map: bool = False  # of slots
    sink_dtype: torch.dtype | None = None
    num_warps: int = WARPS

    @property
    def files(self) -> tuple[str, ...]:
        """Return the kernel's files: registers have no room for wider heads as tensor cores take them."""
        return HEADS_FILES + ("one_token_heads.cu",) if self.head_dim <= 128 else ("one_token_parts.cu", "one_token.cu")

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block: a partial result of each warp, and a share of each block's."""
        return 4 * self.group * (self.num_warps * (self.head_dim + 3) + self.head_dim + 2 * SPLIT)

    def source(self, files: tuple[str, ...], split: int, num_results: int) -> str:
        """Return the source of a kernel for NVRTC.

        split: blocks of a cluster, num_results: those of warps that a block's shared memory has room for.
        """
        defines = {
            "D": self.head_dim,
            "G": self.group,
            "HALF": self.half,
            "IS_HALF": int(self.dtype == torch.float16),
            "WINDOW": self.window,
            "HAS_SOFTCAP": int(self.has_softcap),
            "HAS_MAP": int(self.has_map),
            "SINKS": 0 if self.sink_dtype is None else 1 + (self.sink_dtype == torch.float32),
            "SPLIT": split,
            "WARPS": self.num_warps,
            "RESULTS": num_results,
        }
        return joined(defines, *files)


def source(variant: Variant) -> str:
    """Return a variant's source, for NVRTC."""
    return variant.source(variant.files, SPLIT, variant.num_warps)


@functools.cache
def _kernel(variant: Variant, device: torch.device) -> Kernel:
    cubin = compile_source("one_token", source(variant), ARCHITECTURE)
    with torch.cuda.device(device):
        return Kernel("one_token", cubin, 32 * variant.num_warps, device)


def can_attend_one_token(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    *,
    window: int = -1,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    **_options: Any,
) -> bool:
    """Return whether `attend_one_token` takes these, and is the fastest."""
    num_kv_heads = k_cache.shape[1]
    return (
        takes_products(qkv, rotation, k_cache, v_cache, num_heads, sinks, slopes)
        and num_kv_heads >= MIN_KV_HEADS
        and batch.num_decodes == 1
        and (not is_long(batch) or 0 <= window <= LONG_CONTEXT)
    )


def is_long(batch: AttentionBatch) -> bool:
    """Return whether the first request's context is too long for `attend_one_token`."""
    return bool(batch.seq_lens_host[0] > LONG_CONTEXT)


def takes_products(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> bool:
    """Return whether the kernels of one token take these."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    dtypes = {
        tensor.dtype for tensor in (qkv, k_cache, v_cache, rotation.q_norm, rotation.k_norm) if tensor is not None
    }
    return (
        is_available(qkv.device)
        and slopes is None
        and (sinks is None or sinks.dtype in (qkv.dtype, torch.float32))
        and dtypes in ({torch.bfloat16}, {torch.float16})
        and head_dim == v_cache.shape[2]
        and head_dim in HEAD_DIMS
        and num_heads // num_kv_heads <= MAX_GROUP
        and rotation.positions.dtype == torch.int32
        and rotation.cos_sin.shape[1] % 16 == 0
        and rotation.cos_sin.is_contiguous()
        and qkv.stride(0) % 8 == 0
    )


def attend_one_token(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    *,
    scale: float,
    window: int = -1,
    is_chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    num_warps: int = WARPS,
    **_options: Any,
) -> torch.Tensor:
    """Run `kernels.attention.attention_of_products`."""
    variant = variant_of(qkv, rotation, k_cache, batch, num_heads, window, is_chunked, softcap, sinks, num_warps)
    num_requests, num_kv_heads = batch.num_decodes, k_cache.shape[1]
    out = torch.empty(num_requests, num_heads, variant.head_dim, dtype=qkv.dtype, device=qkv.device)
    if only_compiles():
        compile_ahead(_kernel, variant, qkv.device)
        return out
    args = args_of(qkv, rotation, k_cache, v_cache, batch, out, scale, window, softcap, sinks)
    num_blocks = num_requests * num_kv_heads * SPLIT
    _kernel(variant, qkv.device).launch(num_blocks, SPLIT, variant.shared_bytes, [args], qkv.device)
    return out


def variant_of(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    window: int,
    is_chunked: bool,
    softcap: float,
    sinks: torch.Tensor | None,
    num_warps: int,
) -> Variant:
    """Return what the kernel of these arguments is compiled for."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    return Variant(
        head_dim,
        num_heads // num_kv_heads,
        rotation.cos_sin.shape[1] // 2,
        qkv.dtype,
        0 if window < 0 else 1 + is_chunked,
        softcap > 0,
        batch.slot_map is not None,
        None if sinks is None else sinks.dtype,
        num_warps,
    )


def args_of(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    parts: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> Args:
    """Return a kernel's arguments."""
    return Args(
        qkv.data_ptr(), address(rotation.q_norm), address(rotation.k_norm), k_cache.data_ptr(), v_cache.data_ptr(),
        out.data_ptr(), rotation.cos_sin.data_ptr(), rotation.positions.data_ptr(), batch.seq_lens.data_ptr(),
        batch.rows.data_ptr(), batch.slot_table.data_ptr(), address(batch.slot_map), address(sinks), address(parts),
        address(arrivals), qkv.stride(0), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        batch.slot_table.stride(0), k_cache.shape[1], max(window, 0), scale * LOG2_E,
        softcap * LOG2_E, rotation.eps,
    )  # fmt: skip

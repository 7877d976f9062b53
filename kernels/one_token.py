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
# Multiprocessors do not share out a context further: with fewer heads, or behind a longer one, Triton's is faster.
MIN_KV_HEADS, LONG_CONTEXT = 4, 4096
SPLIT = 8  # blocks of a cluster, which share out a request's tokens
WARPS = 8
LOG2_E = 1.4426950408889634


class Args(ctypes.Structure):
    """The kernels' arguments; `one_token_parts.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "q_norm", "k_norm", "k_cache", "v_cache", "out", "cos_sin", "positions", "seq_lens", "rows",
            "slot_table", "slot_map", "sinks",
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
    def file(self) -> str:
        """Return where the kernel is: registers have no room for wider heads as tensor cores take them."""
        return "one_token_heads.cu" if self.head_dim <= 128 else "one_token.cu"

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block: a partial result of each warp, and a share of each block's."""
        return 4 * self.group * (self.num_warps * (self.head_dim + 3) + self.head_dim + 2 * SPLIT)


def source(variant: Variant) -> str:
    """Return a variant's source, for NVRTC."""
    defines = {
        "D": variant.head_dim,
        "G": variant.group,
        "HALF": variant.half,
        "IS_HALF": int(variant.dtype == torch.float16),
        "WINDOW": variant.window,
        "HAS_SOFTCAP": int(variant.has_softcap),
        "HAS_MAP": int(variant.has_map),
        "SINKS": 0 if variant.sink_dtype is None else 1 + (variant.sink_dtype == torch.float32),
        "SPLIT": SPLIT,
        "WARPS": variant.num_warps,
    }
    return joined(defines, "one_token_parts.cu", variant.file)


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
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    **_options: Any,
) -> bool:
    """Return whether `attend_one_token` takes these, and is faster than Triton's kernel."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    dtypes = {
        tensor.dtype for tensor in (qkv, k_cache, v_cache, rotation.q_norm, rotation.k_norm) if tensor is not None
    }
    return (
        is_available(qkv.device)
        and num_kv_heads >= MIN_KV_HEADS
        and bool((batch.seq_lens_host <= LONG_CONTEXT).all())
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
    num_kv_heads, head_dim = k_cache.shape[1:]
    variant = Variant(
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
    num_requests = batch.num_decodes
    out = torch.empty(num_requests, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if only_compiles():
        compile_ahead(_kernel, variant, qkv.device)
        return out
    args = Args(
        qkv.data_ptr(), address(rotation.q_norm), address(rotation.k_norm), k_cache.data_ptr(), v_cache.data_ptr(),
        out.data_ptr(), rotation.cos_sin.data_ptr(), rotation.positions.data_ptr(), batch.seq_lens.data_ptr(),
        batch.rows.data_ptr(), batch.slot_table.data_ptr(), address(batch.slot_map), address(sinks), qkv.stride(0),
        k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1), batch.slot_table.stride(0),
        num_kv_heads, max(window, 0), scale * LOG2_E, softcap * LOG2_E, rotation.eps,
    )  # fmt: skip
    num_blocks = num_requests * num_kv_heads * SPLIT
    _kernel(variant, qkv.device).launch(num_blocks, SPLIT, variant.shared_bytes, [args], qkv.device)
    return out

"""Attention of single tokens straight from their products, in CUDA for Hopper: see `one_token.cu`."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from kernels.attention_batch import AttentionBatch, HeadRotation
from kernels.hopper import ARCHITECTURE, is_available
from kernels.launch import address
from kernels.nvrtc import compile_source
from kernels.quantized_kernel import Kernel

HEAD_DIMS = (64, 128)
MAX_GROUP = 8  # query heads of a KV head
SPLIT = 8  # blocks of a cluster, which share out a request's tokens
WARPS = 8
LOG2_E = 1.4426950408889634


class Args(ctypes.Structure):
    """The kernel's arguments; `one_token.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "q_norm", "k_norm", "k_cache", "v_cache", "out", "cos_sin", "positions", "seq_lens", "rows",
            "slot_table",
        )),
        *((name, ctypes.c_longlong) for name in (
            "qkv_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride", "table_stride",
        )),
        ("num_kv_heads", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    )  # fmt: skip


def source(head_dim: int, group: int, half: int, dtype: torch.dtype, num_warps: int = WARPS) -> str:
    """Return the kernel's source, for NVRTC. half: elements of a head that rotate with as many others."""
    defines = {
        "D": head_dim, "G": group, "HALF": half, "IS_HALF": int(dtype == torch.float16), "SPLIT": SPLIT,
        "WARPS": num_warps,
    }  # fmt: skip
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join(lines) + Path(__file__).with_suffix(".cu").read_text()


def shared_bytes(head_dim: int, group: int, num_warps: int = WARPS) -> int:
    """Return the shared memory of a block: a partial result of each warp, and of all together."""
    return 4 * (num_warps + 1) * group * (head_dim + 2)


@functools.cache
def _kernel(head_dim: int, group: int, half: int, dtype: torch.dtype, num_warps: int, device: torch.device) -> Kernel:
    cubin = compile_source("one_token", source(head_dim, group, half, dtype, num_warps), ARCHITECTURE)
    with torch.cuda.device(device):
        return Kernel("one_token", cubin, 32 * num_warps, device)


def can_attend_one_token(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    *,
    window: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    **_options: Any,
) -> bool:
    """Return whether `attend_one_token` takes these."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    is_plain = window < 0 and not softcap and sinks is None and slopes is None and batch.slot_map is None
    dtypes = {
        tensor.dtype for tensor in (qkv, k_cache, v_cache, rotation.q_norm, rotation.k_norm) if tensor is not None
    }
    return (
        is_plain
        and is_available(qkv.device)
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
    num_warps: int = WARPS,
    **_options: Any,
) -> torch.Tensor:
    """Run `kernels.attention.attention_of_products`."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    group, half = num_heads // num_kv_heads, rotation.cos_sin.shape[1] // 2
    num_requests = batch.num_decodes
    out = torch.empty(num_requests, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    args = Args(
        qkv.data_ptr(), address(rotation.q_norm), address(rotation.k_norm), k_cache.data_ptr(), v_cache.data_ptr(),
        out.data_ptr(), rotation.cos_sin.data_ptr(), rotation.positions.data_ptr(), batch.seq_lens.data_ptr(),
        batch.rows.data_ptr(), batch.slot_table.data_ptr(), qkv.stride(0), k_cache.stride(0), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(1), batch.slot_table.stride(0), num_kv_heads, scale * LOG2_E, rotation.eps,
    )  # fmt: skip
    kernel = _kernel(head_dim, group, half, qkv.dtype, num_warps, qkv.device)
    num_blocks = num_requests * num_kv_heads * SPLIT
    kernel.launch(num_blocks, SPLIT, shared_bytes(head_dim, group, num_warps), [args], qkv.device)
    return out

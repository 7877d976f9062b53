"""Attention of a single token behind a long context straight from its products, for Hopper: see `long_token.cu`."""

import functools
from typing import Any

import torch

from kernels.attention_batch import AttentionBatch, HeadRotation
from kernels.hopper import ARCHITECTURE
from kernels.launch import arrival_counters, compile_ahead, num_sms, only_compiles
from kernels.nvrtc import compile_source
from kernels.one_token import HEADS_FILES, MAX_GROUP, WARPS, Variant, args_of, is_long, takes_products, variant_of
from kernels.quantized_kernel import Kernel

MAX_HEAD_DIM = 128  # registers have no room for wider ones


def num_results(variant: Variant) -> int:
    """Return how many warps' results a block keeps: so few that the next product's block fits beside it."""
    return variant.num_warps if variant.group <= MAX_GROUP // 2 else variant.num_warps // 2


def shared_bytes(variant: Variant) -> int:
    """Return the shared memory of a block: `MEETING` and `Scratch` of `long_token.cu`."""
    results, by_lane = num_results(variant), 32 * (2 + variant.head_dim // 4)
    by_head = variant.group * (variant.head_dim + 3)
    meeting = 4 * results * (by_head if results == variant.num_warps else max(by_head, by_lane))
    return meeting + 24 * variant.head_dim + 8 * (variant.half + 2) + 16


def source(variant: Variant) -> str:
    """Return a variant's source, for NVRTC."""
    return variant.source((*HEADS_FILES, "long_token.cu"), 1, num_results(variant))


@functools.cache
def _kernel(variant: Variant, device: torch.device) -> Kernel:
    cubin = compile_source("long_token", source(variant), ARCHITECTURE)
    with torch.cuda.device(device):
        return Kernel("long_token", cubin, 32 * variant.num_warps, device)


def can_attend_long_token(
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
    """Return whether `attend_long_token` takes these, and is faster than Triton's kernel."""
    return (
        takes_products(qkv, rotation, k_cache, v_cache, num_heads, sinks, slopes)
        and batch.num_decodes == 1
        and is_long(batch)
        and k_cache.shape[2] <= MAX_HEAD_DIM
    )


def attend_long_token(
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
    **_options: Any,
) -> torch.Tensor:
    """Run `kernels.attention.attention_of_products`."""
    variant = variant_of(qkv, rotation, k_cache, batch, num_heads, window, is_chunked, softcap, sinks, WARPS)
    device, num_kv_heads = qkv.device, k_cache.shape[1]
    out = torch.empty(1, num_heads, variant.head_dim, dtype=qkv.dtype, device=device)
    num_blocks = max(num_sms(device) // num_kv_heads, 1) * num_kv_heads
    parts = torch.empty(num_blocks, variant.group * (variant.head_dim + 2), dtype=torch.float32, device=device)
    arrivals = arrival_counters(device, num_kv_heads)
    if only_compiles():
        compile_ahead(_kernel, variant, device)
        return out
    args = args_of(qkv, rotation, k_cache, v_cache, batch, out, scale, window, softcap, sinks, parts, arrivals)
    _kernel(variant, device).launch(num_blocks, 1, shared_bytes(variant), [args], device)
    return out

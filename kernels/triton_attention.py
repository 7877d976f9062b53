"""Attention over the paged KV cache in Triton, and of prompts on Hopper in CUDA; see `kernels.attention.attention`."""

from typing import Any

import torch

from kernels import hopper_prefill
from kernels.attention_batch import AttentionBatch, HeadRotation
from kernels.triton_decode import decode
from kernels.triton_prefill import prefill


def attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = -1,
    is_chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    has_decodes: bool = True,
) -> torch.Tensor:
    """Run `kernels.attention.attention` in Triton. On one device it must not run on two streams at once."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_decodes = batch.num_decodes
    options: dict[str, Any] = {
        "window": window, "is_chunked": is_chunked, "softcap": softcap, "sinks": sinks, "slopes": slopes
    }  # fmt: skip
    if num_decodes and has_decodes:
        decode(q, k_cache, v_cache, batch, out, scale=scale, **options)
    if num_decodes == len(batch.rows):
        return out
    if hopper_prefill.can_prefill(q, k_cache, v_cache, batch, window=window, sinks=sinks, slopes=slopes):
        del options["slopes"]
        hopper_prefill.prefill(q, k_cache, v_cache, batch, out, scale=scale, **options)
    else:
        prefill(q, k_cache, v_cache, batch, out, scale=scale, **options)
    return out


def attention_of_products_triton(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    **options: Any,
) -> torch.Tensor:
    head_dim = k_cache.shape[2]
    q = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    decode(q, k_cache, v_cache, batch, out, rotation=rotation, **options)
    return out

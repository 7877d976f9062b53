"""Attention over the paged KV cache in Triton; the definition is `kernels.attention.attention_torch`."""

import torch

from kernels.attention_batch import AttentionBatch
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
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    has_decodes: bool = True,
) -> torch.Tensor:
    """Run `kernels.attention.attention` in Triton. On one device it must not run on two streams at once."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_decodes = batch.num_decodes
    if num_decodes and has_decodes:
        decode(q, k_cache, v_cache, batch, out, scale=scale, window=window, softcap=softcap, sinks=sinks)
    if num_decodes < len(batch.rows):
        prefill(q, k_cache, v_cache, batch, out, scale=scale, window=window, softcap=softcap, sinks=sinks)
    return out

"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2): its definition in torch, and the choice of a kernel.

Of each token the cache holds a latent vector c and a rotated key r, [c, r], for all heads. Head h has the key
[U_h c, r] and the value V_h c; it attends as `kernels.attention` says. There are two ways to the same sums:

expanded    keys and values are made of the context's latents: least work for each pair of tokens
absorbed    U_h^T takes a query to where the latents are, which then are keys and values of all heads, as of one KV
            head, and V_h is applied to what was found: least work for a token of the context, so for single queries
"""

import torch
import torch.nn.functional as F

from kernels.attention import decodes_torch, gather, prompt_slots, prompt_torch
from kernels.attention_batch import AttentionBatch
from kernels.latents import Expansion, absorb, values_of


def latent_attention_torch(
    q: torch.Tensor, cache: torch.Tensor, expansion: Expansion, batch: AttentionBatch, *, scale: float
) -> torch.Tensor:
    """Define `latent_attention`. Sizes come from the host's lengths, so a CUDA graph cannot capture it."""
    sizes = expansion.sizes
    out = q.new_empty(*q.shape[:2], sizes.value_dim)
    if end := batch.num_decodes:
        queries = _absorbed_queries(q[:end], expansion)
        found = torch.empty_like(queries)
        decodes_torch(queries, cache, cache, batch, found, scale=scale)
        values_of(found[..., : sizes.rank], expansion, out[:end])
    for i in range(end, len(batch.seq_lens_host)):
        start, end = end, end + int(batch.q_lens_host[i])
        seq_len = int(batch.seq_lens_host[i])
        latents = gather(cache, prompt_slots(batch, i), q.dtype)
        if sizes.saved_by_absorbing(end - start, seq_len) > 0:
            queries = _absorbed_queries(q[start:end], expansion)
            found = prompt_torch(queries, latents, latents, seq_len, scale=scale)
            values_of(found[..., : sizes.rank], expansion, out[start:end])
        else:
            keys, values = _expanded(latents[:, 0], expansion)
            out[start:end] = prompt_torch(q[start:end], keys, values, seq_len, scale=scale)
    return out


def _absorbed_queries(q: torch.Tensor, expansion: Expansion) -> torch.Tensor:
    """Return queries [T, H, R + P] for latents of q [T, H, N + P]."""
    n = expansion.sizes.key_dim
    return torch.cat((absorb(q[..., :n], expansion), q[..., n:]), dim=-1)


def _expanded(latents: torch.Tensor, expansion: Expansion) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [L, H, N + P] and values [L, H, V] of latents [L, R + P]."""
    num_heads, rank, n = expansion.num_heads, expansion.sizes.rank, expansion.sizes.key_dim
    made = F.linear(latents[:, :rank], expansion.weight).unflatten(1, (num_heads, -1))
    rotated = latents[:, None, rank:].expand(-1, num_heads, -1)
    return torch.cat((made[..., :n], rotated), dim=-1), made[..., n:]


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    expansion: Expansion,
    batch: AttentionBatch,
    *,
    scale: float,
    backend: str = "torch",
) -> torch.Tensor:
    """Attend q [T, H, N + P], its last P rotated, to the latents of `cache` [num_slots, 1, R + P]: [T, H, V].

    The cache is of q's dtype or of float8. FlashInfer is not asked: "triton" serves for it.
    """
    if backend == "torch":
        return latent_attention_torch(q, cache, expansion, batch, scale=scale)
    from kernels.triton_mla import latent_attention_triton  # here: a machine without a GPU need not have triton

    return latent_attention_triton(q, cache, expansion, batch, scale=scale)

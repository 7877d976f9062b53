"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2): its definition in torch, and the choice of a kernel.

Of each token the cache holds a latent vector c and a rotated key r, [c, r], for all heads. Head h has the key
[U_h c, r] and the value V_h c; it attends as `kernels.attention` says. There are two ways to the same sums:

expanded    keys and values are made of the context's latents: least work for each pair of tokens
absorbed    U_h^T takes a query to where the latents are, which then are keys and values of all heads, as of one KV
            head, and V_h is applied to what was found: least work for a token of the context, so for single queries
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.attention import decodes_torch, gather, prompt_slots, prompt_torch
from kernels.attention_batch import AttentionBatch


class Expansion(NamedTuple):
    """The matrix that makes keys and values of latents, for H heads."""

    weight: torch.Tensor  # [H (N + V), R]: a head's U, then its V
    num_heads: int
    key_dim: int  # N

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    @property
    def by_head(self) -> torch.Tensor:
        """Return the matrix as [H, N + V, R]."""
        return self.weight.view(self.num_heads, -1, self.rank)

    @property
    def value_dim(self) -> int:
        return self.weight.shape[0] // self.num_heads - self.key_dim

    def prefers_absorbed(self, q_len: int, seq_len: int) -> bool:
        """Return whether the last `q_len` of `seq_len` tokens take fewer multiplications the absorbed way."""
        of_token = self.rank * (self.key_dim + self.value_dim)
        of_pair = 2 * self.rank - self.key_dim - self.value_dim  # more than expanded ones take
        return q_len * seq_len * of_pair < (seq_len - q_len) * of_token


def absorb(q: torch.Tensor, expansion: Expansion) -> torch.Tensor:
    """Take the parts of queries that are not rotated to the latents' space: [T, H, N] -> [T, H, R]."""
    keys = expansion.by_head[:, : expansion.key_dim]
    absorbed = q.new_empty(*q.shape[:2], expansion.rank)
    torch.bmm(q.transpose(0, 1), keys, out=absorbed.transpose(0, 1))
    return absorbed


def values_of(found: torch.Tensor, expansion: Expansion) -> torch.Tensor:
    """Make each head's value of the latent that it found: [T, H, R] -> [T, H, V]."""
    values = expansion.by_head[:, expansion.key_dim :]
    out = found.new_empty(*found.shape[:2], expansion.value_dim)
    torch.bmm(found.transpose(0, 1), values.transpose(1, 2), out=out.transpose(0, 1))
    return out


def latent_attention_torch(
    q: torch.Tensor, cache: torch.Tensor, expansion: Expansion, batch: AttentionBatch, *, scale: float
) -> torch.Tensor:
    """Define `latent_attention`. Sizes come from the host's lengths, so a CUDA graph cannot capture it."""
    out = q.new_empty(*q.shape[:2], expansion.value_dim)
    if end := batch.num_decodes:
        queries = _absorbed_queries(q[:end], expansion)
        found = torch.empty_like(queries)
        decodes_torch(queries, cache, cache, batch, found, scale=scale)
        out[:end] = values_of(found[..., : expansion.rank], expansion)
    for i in range(end, len(batch.seq_lens_host)):
        start, end = end, end + int(batch.q_lens_host[i])
        seq_len = int(batch.seq_lens_host[i])
        latents = gather(cache, prompt_slots(batch, i), q.dtype)
        if expansion.prefers_absorbed(end - start, seq_len):
            queries = _absorbed_queries(q[start:end], expansion)
            found = prompt_torch(queries, latents, latents, seq_len, scale=scale)
            out[start:end] = values_of(found[..., : expansion.rank], expansion)
        else:
            keys, values = _expanded(latents[:, 0], expansion)
            out[start:end] = prompt_torch(q[start:end], keys, values, seq_len, scale=scale)
    return out


def _absorbed_queries(q: torch.Tensor, expansion: Expansion) -> torch.Tensor:
    """Return queries [T, H, R + P] for latents of q [T, H, N + P]."""
    n = expansion.key_dim
    return torch.cat((absorb(q[..., :n], expansion), q[..., n:]), dim=-1)


def _expanded(latents: torch.Tensor, expansion: Expansion) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [L, H, N + P] and values [L, H, V] of latents [L, R + P]."""
    num_heads, rank, n = expansion.num_heads, expansion.rank, expansion.key_dim
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

    The cache is of q's dtype or of float8.
    """
    if backend == "torch":
        return latent_attention_torch(q, cache, expansion, batch, scale=scale)
    raise NotImplementedError(f"latent attention by {backend!r}")

"""Attention over the paged KV cache: its definition in torch (also what runs on a CPU), and the choice of a kernel.

softmax(scale q k^T) v, where the q_len tokens of a request are its last ones and each sees itself and what is before
it. Token j of request i lies in slot slot_table[rows[i], j] of k_cache and v_cache.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

BACKENDS = ("flashinfer", "triton", "torch")


class SharedPrefixes(Protocol):
    """Groups of decoding requests whose first tokens lie in the same slots. Each request is in one group at most."""

    @property
    def prefix_lens(self) -> torch.Tensor:
        """int32 [G], shared tokens; 0 for an unused group."""

    @property
    def cu_members(self) -> torch.Tensor:
        """int32 [G + 1], where each group's requests start in `members`."""

    @property
    def members(self) -> torch.Tensor:
        """int32 [B], request indices, group after group."""

    @property
    def own_starts(self) -> torch.Tensor:
        """int32 [B], the first token that is not in the request's group's prefix."""


class AttentionBatch(Protocol):
    """What attention reads of a step: T tokens of B requests, those with a single token first."""

    @property
    def rows(self) -> torch.Tensor:
        """int32 [B], each request's line in slot_table."""

    @property
    def seq_lens(self) -> torch.Tensor:
        """int32 [B], tokens that a request's last token sees, itself included."""

    @property
    def cu_q_lens(self) -> torch.Tensor:
        """int32 [B + 1], where each request's tokens start in [T]."""

    @property
    def slot_table(self) -> torch.Tensor:
        """int32 [num_rows, max_context]."""

    @property
    def num_decodes(self) -> int:
        """How many requests, the first ones, have a single token."""

    @property
    def q_lens_host(self) -> np.ndarray:
        """int32 [B]. The decode kernels of "triton" do not look at it: in a captured graph it is not the step's."""

    @property
    def seq_lens_host(self) -> np.ndarray:
        """int32 [B], likewise."""

    @property
    def shared(self) -> SharedPrefixes | None:
        """Prefixes to read once per group. They change the work, not the result."""


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
    backend: str = "torch",
) -> torch.Tensor:
    """q [T, H, D], caches [num_slots, Hkv, D] (q's dtype or float8) -> [T, H, D].

    window: a token sees at most that many last tokens, itself included; -1: all. softcap c > 0: scores become
    c tanh(score / c). With "triton" or "flashinfer" a batch of single tokens only can be captured in a CUDA graph:
    lengths and slots are read on the device, and the launch depends on nothing but shapes.
    """
    if backend == "torch":
        return attention_torch(q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap)
    from kernels.triton_attention import attention_triton  # here: a machine without a GPU need not have triton

    if backend == "triton" or batch.num_decodes == len(batch.rows):
        return attention_triton(q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap)
    from kernels.flashinfer_attention import attention_flashinfer

    return attention_flashinfer(q, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap)


def choose_backend(requested: str | None, device: torch.device) -> tuple[str, str]:
    """(backend, why) for `device`; None asks for the best. Raises ValueError where `requested` cannot run."""
    if requested not in (None, *BACKENDS):
        raise ValueError(f"no attention backend {requested!r}; there are {', '.join(BACKENDS)}")
    if requested == "torch" or (requested is None and device.type != "cuda"):
        return "torch", "as asked" if requested else f"the one for {device.type}"
    if device.type != "cuda":
        raise ValueError(f"attention backend {requested!r} needs a CUDA device, and this is {device.type!r}")
    if requested == "triton":
        return "triton", "as asked"
    from kernels.flashinfer_attention import is_available

    available, reason = is_available()
    if available:
        return "flashinfer", reason
    if requested == "flashinfer":
        raise ValueError(f"attention backend 'flashinfer' cannot run: {reason}")
    return "triton", reason


def attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The definition of `attention`. Sizes come from the host's lengths, so it cannot be captured."""
    out = torch.empty_like(q)
    num_decodes = batch.num_decodes
    lens = batch.seq_lens_host
    first_seen = np.maximum(lens - window, 0) if window >= 0 else np.zeros_like(lens)  # by a request's last token
    for members in _similar_lengths(lens[:num_decodes] - first_seen[:num_decodes]):
        _decode(q, k_cache, v_cache, batch, members, lens[members], first_seen[members], scale, softcap, out)
    end = num_decodes
    for i in range(num_decodes, len(lens)):
        start, end = end, end + int(batch.q_lens_host[i])
        _prefill(q, k_cache, v_cache, batch, i, start, end, scale, window, softcap, out)
    return out


def _similar_lengths(lens: np.ndarray) -> Iterator[np.ndarray]:
    """Split requests into sets that waste little when padded to their longest; indices, ascending in each set."""
    order = np.argsort(-lens, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lens[order[start]])
        # A set costs about as much as reading 64 tokens, so it need not be finer than that.
        shortest = longest - max(64, longest // 4)
        stop = start + int(np.searchsorted(-lens[order[start:]], -shortest, side="right"))
        yield np.sort(order[start:stop])
        start = stop


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    members: np.ndarray,
    lens: np.ndarray,
    first_seen: np.ndarray,
    scale: float,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """The single tokens of `members`, whose heads of one KV head take the place of a sequence's queries."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, n = k_cache.shape[1], len(members)
    num_seen = lens - first_seen
    longest = int(num_seen.max())
    is_ragged = int(num_seen.min()) < longest
    is_all = n == batch.num_decodes
    index = torch.from_numpy(members).to(q.device)
    rows = batch.rows[:n] if is_all else batch.rows[index]
    if not is_ragged and not first_seen.any():
        slots = batch.slot_table[:, :longest].index_select(0, rows)
    else:
        tokens = np.minimum(first_seen[:, None] + np.arange(longest), lens[:, None] - 1)
        slots = batch.slot_table[rows[:, None], torch.from_numpy(tokens).to(q.device)]
    k = _gather(k_cache, slots.flatten(), q.dtype).view(n, longest, num_kv_heads, head_dim).transpose(1, 2)
    v = _gather(v_cache, slots.flatten(), q.dtype).view(n, longest, num_kv_heads, head_dim).transpose(1, 2)
    mask = None
    if is_ragged:
        mask = torch.from_numpy(np.arange(longest) < num_seen[:, None])[:, None, None].to(q.device)
    queries = q[:n] if is_all else q[index]
    queries = queries.reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    result = _sdpa(queries, k, v, mask, False, scale, softcap).reshape(n, num_heads, head_dim)
    if is_all:
        out[:n] = result
    else:
        out[index] = result


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    i: int,
    start: int,
    end: int,
    scale: float,
    window: int,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """Request i, whose tokens are [start, end) of q."""
    q_len, seq_len = end - start, int(batch.seq_lens_host[i])
    first_seen = max(seq_len - q_len + 1 - window, 0) if window >= 0 else 0  # by the first of its tokens
    slots = batch.slot_table[batch.rows[i], first_seen:seq_len]
    k = _gather(k_cache, slots, q.dtype).transpose(0, 1)[None]
    v = _gather(v_cache, slots, q.dtype).transpose(0, 1)[None]
    num_seen = seq_len - first_seen
    is_plain = q_len == num_seen and not 0 <= window < q_len
    mask = None
    if not is_plain:
        positions = torch.arange(num_seen - q_len, num_seen, device=q.device)[:, None]
        tokens = torch.arange(num_seen, device=q.device)
        mask = tokens <= positions
        if window >= 0:
            mask &= tokens > positions - window
    out[start:end] = _sdpa(q[start:end].transpose(0, 1)[None], k, v, mask, is_plain, scale, softcap)[0].transpose(0, 1)


def _gather(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `slots` [N] of the cache in `dtype`: [N, Hkv, D]."""
    if cache.dtype.itemsize == 1:  # torch gathers no float8
        return cache.view(torch.uint8).index_select(0, slots).view(cache.dtype).to(dtype)
    return cache.index_select(0, slots).to(dtype)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """q [n, H, Q, D], k and v [n, Hkv, L, D], mask broadcast to [n, H, Q, L] -> [n, H, Q, D]."""
    is_grouped = q.shape[1] != k.shape[1]
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped)
    group = q.shape[1] // k.shape[1]
    scores = (q.float() * scale) @ k.float().repeat_interleave(group, 1).transpose(-1, -2)
    scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.float().repeat_interleave(group, 1)).to(q.dtype)

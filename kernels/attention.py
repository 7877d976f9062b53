"""Attention over the paged KV cache: its definition in torch (also what runs on a CPU), and the choice of a kernel.

softmax(scale q k^T) v, where the q_len tokens of a request are its last ones and each sees itself and what is before
it, or, where `seen_until` says so, also some tokens behind it. A head may have a sink, a score that takes its share of
the softmax and adds nothing, or a slope, which its scores lose with each token of distance (ALiBi, Press et al. 2022).
Token j of request i lies in slot slot_table[rows[i], j] of k_cache and v_cache, or in the one that slot_map has for it;
of tokens that no query sees, slot_map may say anything.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kernels.attention_batch import AttentionBatch, HeadRotation
from kernels.cache_cpu import Gathered, kernels, kernels_ahead
from kernels.elementwise import rope_and_store_torch
from kernels.long_token import attend_long_token, can_attend_long_token
from kernels.one_token import attend_one_token, can_attend_one_token

logger = logging.getLogger(__name__)

BACKENDS = ("flashinfer", "triton", "torch")
KEY_MULTIPLE = 32  # of keys; see `_padded_len`


def attention_torch(
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
    """Define `attention`. Sizes come from the host's lengths, so a CUDA graph cannot capture it."""
    sets = _decode_sets(SameBatch(batch), window, is_chunked, q.dtype, slopes is not None) if has_decodes else []
    if len(sets) == 1 and batch.num_decodes == len(q):
        return _decode(q, k_cache, v_cache, sets[0], scale, softcap, sinks, slopes)
    out = q.new_empty(*q.shape[:2], v_cache.shape[2])
    for members in sets:
        out[members.index] = _decode(q[members.index], k_cache, v_cache, members, scale, softcap, sinks, slopes)
    end = batch.num_decodes
    for i in range(end, len(batch.seq_lens_host)):
        start, end = end, end + int(batch.q_lens_host[i])
        _prefill(q, k_cache, v_cache, batch, i, start, end, scale, window, is_chunked, softcap, sinks, slopes, out)
    return out


def decodes_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    is_chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> None:
    """Write `attention_torch` of the first num_decodes tokens alone into `out`."""
    for members in _decode_sets(SameBatch(batch), window, is_chunked, q.dtype, slopes is not None):
        out[members.index] = _decode(q[members.index], k_cache, v_cache, members, scale, softcap, sinks, slopes)


class SameBatch:
    """A batch as a key: equal to itself only. Each step brings its own, and all layers of a step the same."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.batch = batch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameBatch) and self.batch is other.batch

    def __hash__(self) -> int:
        return id(self.batch)


@dataclass(slots=True)
class DecodeSet:
    """Single tokens of N requests, whose keys and values are gathered together, L slots each."""

    index: torch.Tensor | slice  # of the requests, in the batch and in q
    slots: torch.Tensor  # int32 [N * L]
    num_slots: int  # L
    mask: torch.Tensor | None  # [N, 1, 1, L], to be added, if some have fewer than L; torch would convert a bool one
    distances: torch.Tensor | None  # float32 [N, 1, 1, L], of the query from each token, for layers with slopes
    gathered: dict[torch.Size, Gathered] = field(default_factory=dict)  # by the shape of a slot

    def gather(
        self, k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, [N, Hkv, L, D] each in `dtype`, until the next layer's are gathered."""
        if dtype == k_cache.dtype and (room := self.room(k_cache, v_cache)) is not None:
            return room.of(k_cache, v_cache)
        num_requests = len(self.slots) // self.num_slots
        k = v = gather(k_cache, self.slots, dtype).unflatten(0, (num_requests, -1)).transpose(1, 2)
        if v_cache is not k_cache:
            v = gather(v_cache, self.slots, dtype).unflatten(0, (num_requests, -1)).transpose(1, 2)
        return k, v

    def room(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Gathered | None:
        """Return room for what `gather` finds in caches of one dtype; None where no compiled kernel takes them."""
        if (compiled := kernels()) is None or not compiled.can_gather(k_cache, v_cache):
            return None
        shape = k_cache.shape[1:]
        if shape not in self.gathered:
            num_requests = len(self.slots) // self.num_slots
            self.gathered[shape] = compiled.room_for(k_cache, self.slots, num_requests)
        return self.gathered[shape]

    def mask_of(self, slopes: torch.Tensor | None) -> torch.Tensor | None:
        """Return what is to be added to scores [N, Hkv, H / Hkv, L]; slopes: [Hkv, H / Hkv, 1]."""
        if slopes is None:
            return self.mask
        assert self.distances is not None
        bias = self.distances * -slopes
        return bias if self.mask is None else bias.add_(self.mask)


def only_set(
    batch: AttentionBatch, window: int, is_chunked: bool, dtype: torch.dtype, has_slopes: bool
) -> DecodeSet | None:
    """Return all requests of a batch of single tokens as one set; None if their lengths differ too much."""
    sets = _decode_sets(SameBatch(batch), window, is_chunked, dtype, has_slopes)
    return sets[0] if len(sets) == 1 else None


@functools.lru_cache(maxsize=2)  # one step's sets: of layers with a window and of layers without
def _decode_sets(
    key: SameBatch, window: int, is_chunked: bool, dtype: torch.dtype, has_slopes: bool
) -> list[DecodeSet]:
    batch = key.batch
    all_lens = batch.seq_lens_host[: batch.num_decodes]
    all_firsts = np.maximum(_first_seen(all_lens - 1, window, is_chunked), 0)
    sets = []
    for members in _similar_lengths(all_lens - all_firsts):
        lens, firsts = all_lens[members, None], all_firsts[members, None]
        longest = _padded_len(int((lens - firsts).max()))
        tokens = torch.from_numpy(np.minimum(firsts + np.arange(longest), lens - 1)).to(batch.slot_table.device)
        is_padding = np.arange(longest) >= lens - firsts
        mask = None
        if is_padding.any():
            is_hidden = torch.from_numpy(is_padding)[:, None, None].to(tokens.device)
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=tokens.device).masked_fill_(is_hidden, -torch.inf)
        is_all = len(members) == batch.num_decodes
        index = slice(0, len(members)) if is_all else torch.from_numpy(members).to(tokens.device)
        slots = batch.slot_table[batch.rows[index][:, None], tokens].flatten()
        distances = None
        if has_slopes:
            distances = (torch.from_numpy(lens - 1).to(tokens) - tokens)[:, None, None].float()
        sets.append(DecodeSet(index, _mapped(slots, batch), longest, mask, distances))
    return sets


def _first_seen(position: Any, window: int, is_chunked: bool) -> Any:
    """Return the first token that the one at `position` sees; it may be negative."""
    if window < 0:
        return position * 0
    return position // window * window if is_chunked else position - window + 1


def _similar_lengths(lens: np.ndarray) -> Iterator[np.ndarray]:
    """Yield sets of requests that waste little when padded to their longest: indices, ascending in each set."""
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
    members: DecodeSet,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention of the single tokens of a set, q [N, H, D]."""
    k, v = members.gather(k_cache, v_cache, q.dtype)
    return decode_gathered(q, k, v, members, scale, softcap, sinks, slopes)


def decode_gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    members: DecodeSet,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention of the single tokens of a set, q [N, H, D], to their k and v [N, Hkv, L, D]: [N, H, D].

    The heads of one KV head take the place of a sequence's queries, so no key or value is repeated for them.
    """
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    queries = q.reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    of_rows = None if sinks is None else sinks.view(num_kv_heads, -1)
    mask = members.mask_of(None if slopes is None else slopes.view(num_kv_heads, -1, 1))
    return _sdpa(queries, k, v, mask, False, scale, softcap, of_rows).reshape(n, num_heads, -1)


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
    is_chunked: bool,
    softcap: float,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the attention of request i, whose tokens are [start, end) of q, into `out`."""
    q_len, seq_len = end - start, int(batch.seq_lens_host[i])
    first_seen = max(_first_seen(seq_len - q_len, window, is_chunked), 0)  # by the request's first new token
    slots = prompt_slots(batch, i, first_seen)
    k, v = gather(k_cache, slots, q.dtype), gather(v_cache, slots, q.dtype)
    num_seen = seq_len - first_seen
    seen_until = None if batch.seen_until is None else batch.seen_until[start:end] - first_seen
    out[start:end] = prompt_torch(
        q[start:end], k, v, num_seen, scale=scale, window=window, is_chunked=is_chunked, softcap=softcap,
        sinks=sinks, slopes=slopes, seen_until=seen_until,
    )  # fmt: skip


def prompt_slots(batch: AttentionBatch, i: int, first: int = 0) -> torch.Tensor:
    """Return the slots of request i from token `first` on, padded by the last one: see `_padded_len`."""
    seq_len = int(batch.seq_lens_host[i])
    tokens = torch.arange(first, first + _padded_len(seq_len - first), device=batch.slot_table.device)
    slots = batch.slot_table[batch.rows[i]].index_select(0, tokens.clamp_(max=seq_len - 1))
    return _mapped(slots, batch)


def prompt_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_seen: int,
    *,
    scale: float,
    window: int = -1,
    is_chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    seen_until: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend q [Q, H, D], the last of `num_seen` tokens, to their k [L, Hkv, D] and v [L, Hkv, Dv]: [Q, H, Dv].

    L: `num_seen`, padded by any finite values.
    """
    q_len, num_keys = len(q), len(k)
    queries, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    is_plain = q_len == num_seen and not 0 <= window < q_len and slopes is None and seen_until is None
    mask = None
    if is_plain:
        queries = F.pad(queries, (0, 0, 0, num_keys - num_seen))  # no real query sees the keys of those added
    else:
        tokens = torch.arange(num_keys, device=q.device)
        positions = torch.arange(num_seen - q_len, num_seen, device=q.device)[:, None]
        mask = tokens <= positions if seen_until is None else tokens < seen_until[:, None]
        if window >= 0:
            mask &= tokens >= _first_seen(positions, window, is_chunked)  # chunks are cut from the first key on
        if slopes is not None:
            mask = ((tokens - positions) * slopes[None, :, None, None]).masked_fill_(~mask, -torch.inf)
    of_rows = None if sinks is None else sinks[:, None]
    return _sdpa(queries, k, v, mask, is_plain, scale, softcap, of_rows)[0, :, :q_len].transpose(0, 1)


def _padded_len(num_keys: int) -> int:
    """Return how many keys to compute with, the last of them hidden.

    Vector units round what they do not fill otherwise than what they do: padded to whole vectors, a token's result is
    the same bits whether its request runs alone, beside longer ones, in chunks or behind a cached prefix.
    """
    return -(-num_keys // KEY_MULTIPLE) * KEY_MULTIPLE


def _mapped(slots: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
    """Return the slots of the caches that stand for those of the table, [N]."""
    return slots if batch.slot_map is None else batch.slot_map[slots]


def gather(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows `slots` [N] of the cache in `dtype`: [N, Hkv, D]."""
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
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return softmax(scale q k^T) v [n, H, Q, Dv] of q [n, H, Q, D], k [n, Hkv, L, D] and v [n, Hkv, L, Dv].

    mask: bool, or to be added to the scores, in q's dtype or float32; broadcast to [n, H, Q, L]. sinks: broadcast to
    [H, Q].
    """
    v_dim = v.shape[3]
    missing = q.shape[3] - v_dim
    if not missing or softcap:
        return _sdpa_of_one_width(q, k, v, mask, is_causal, scale, softcap, sinks)
    # torch's kernels for CPUs take one width only; without them this takes two to seven times as long.
    if missing > 0:
        v = F.pad(v, (0, missing))
    else:
        q, k = F.pad(q, (0, -missing)), F.pad(k, (0, -missing))
    return _sdpa_of_one_width(q, k, v, mask, is_causal, scale, softcap, sinks)[..., :v_dim]


def _sdpa_of_one_width(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Run `_sdpa`. With a softcap widths may differ."""
    is_grouped = q.shape[1] != k.shape[1]
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped)
    if not softcap and q.is_cpu:
        return _beside_sinks(q, k, v, mask, is_causal, scale, sinks)
    group = q.shape[1] // k.shape[1]
    scores = (q.float() * scale) @ k.float().repeat_interleave(group, 1).transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.float()[None, :, :, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v.float().repeat_interleave(group, 1)).to(q.dtype)


def _beside_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Run `_sdpa` with sinks by torch's kernel for CPUs, which keeps no scores but returns their log-sum-exp."""
    assert sinks is not None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found, lse = attend(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return (found * torch.sigmoid(lse - sinks.float())[..., None]).to(q.dtype)


def attention(
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
    backend: str = "torch",
    has_decodes: bool = True,
) -> torch.Tensor:
    """Attend q [T, H, D] to caches [num_slots, Hkv, D] and [num_slots, Hkv, Dv], in q's dtype or float8: [T, H, Dv].

    window: a token sees at most that many last tokens, itself included; -1: all. is_chunked: of these, those since the
    last multiple of the window (Llama 4). softcap c > 0: scores become c tanh(score / c). sinks [H]: a score of each
    head that is in the softmax's denominator alone. slopes [H], float32: what scores lose with each token of distance.
    Not has_decodes: single tokens' part of the result is left as it is (`kernels.corun` fills it). In a CUDA graph
    "flashinfer", which plans on the host, leaves all to "triton", as it always does for single tokens: that depends on
    nothing but shapes, and reads lengths and slots on the device.
    """
    options: dict[str, Any] = {
        "scale": scale, "window": window, "is_chunked": is_chunked, "softcap": softcap, "sinks": sinks,
        "slopes": slopes, "has_decodes": has_decodes,
    }  # fmt: skip
    if backend == "torch":
        return attention_torch(q, k_cache, v_cache, batch, **options)
    from kernels.triton_attention import attention_triton  # here: a machine without a GPU need not have triton

    is_ours = batch.is_for_graph or batch.num_decodes == len(batch.rows) or batch.seen_until is not None
    if backend == "triton" or is_ours:
        return attention_triton(q, k_cache, v_cache, batch, **options)
    from kernels.flashinfer_attention import attention_flashinfer

    return attention_flashinfer(q, k_cache, v_cache, batch, **options)


def attention_of_products_torch(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    **options: Any,
) -> torch.Tensor:
    num_kv_heads, head_dim = k_cache.shape[1:]
    slots = batch.slot_table[batch.rows.long(), (batch.seq_lens - 1).long()]
    if batch.slot_map is not None:
        slots = batch.slot_map[slots.long()]
    positions, cos_sin, q_norm, k_norm, eps = rotation
    q = rope_and_store_torch(
        qkv, positions, cos_sin, k_cache, v_cache, slots, num_heads, num_kv_heads, head_dim, q_norm, k_norm, eps
    )
    return attention_torch(q, k_cache, v_cache, batch, **options)


def attention_of_products(
    qkv: torch.Tensor,
    rotation: HeadRotation,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    num_heads: int,
    backend: str = "torch",
    **options: Any,
) -> torch.Tensor:
    """Return `attention` of queries that `rope_and_store` makes of products [T, (H + 2 Hkv) D], [T, H, D].

    Each token's key and value are written to the slot that the batch has for it. batch: one that `fits_one_kernel`.
    options: of `attention`.
    """
    arguments = qkv, rotation, k_cache, v_cache, batch, num_heads
    if backend == "torch":
        return attention_of_products_torch(*arguments, **options)
    if can_attend_one_token(*arguments, **options):
        return attend_one_token(*arguments, **options)
    if can_attend_long_token(*arguments, **options):
        return attend_long_token(*arguments, **options)
    from kernels.triton_attention import attention_of_products_triton  # here: a machine without a GPU need not have it

    return attention_of_products_triton(*arguments, **options)


def fits_one_kernel(batch: AttentionBatch, backend: str) -> bool:
    """Return whether `attention_of_products` takes a step: all of its tokens are single ones.

    Where requests share a prefix, another kernel reads their queries too. No request may see what the step stores for
    another one: see `engine.schedule.scheduler`. Slots of windows are not so: what has lost its own there gets another,
    and is stored again for all that see it.
    """
    if not 0 < batch.num_decodes == len(batch.rows) or backend == "torch" or batch.shared is not None:
        return False
    return batch.slot_map is None or batch.num_decodes == 1


def choose_backend(requested: str | None, device: torch.device) -> str:
    """Choose the backend for `device`; None asks for the best. Raises ValueError where `requested` cannot run.

    Where FlashInfer itself is all that is missing, warns, and Triton serves in its place. A CPU's begin to load.
    """
    if requested not in (None, *BACKENDS):
        raise ValueError(f"no attention backend {requested!r}; there are {', '.join(BACKENDS)}")
    if requested == "torch" or (requested is None and device.type != "cuda"):
        if device.type == "cpu":
            kernels_ahead()
        return "torch"
    if device.type != "cuda":
        raise ValueError(f"attention backend {requested!r} needs a CUDA device, and this is {device.type!r}")
    if requested == "flashinfer":
        from kernels.flashinfer_attention import is_available

        available, reason = is_available()
        if not available:
            logger.warning("attention backend 'flashinfer' cannot run, triton serves instead: %s", reason)
            return "triton"
    return requested or "triton"

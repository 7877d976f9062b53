"""Multi-head latent attention in Triton: the kernels of `triton_decode` and `triton_prefill`, on latents or expanded.

Prompts whose keys are expanded go to `hopper_prefill` where it serves, single tokens to `hopper_latents`.

The definition is `kernels.mla.latent_attention_torch`.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels import hopper_latents, hopper_prefill
from kernels.attention import SameBatch, gather
from kernels.attention_batch import AttentionBatch, SharedPrefixes
from kernels.card import card_of
from kernels.latents import Expansion, LatentSizes, absorb, graph_room, values_of
from kernels.launch import cdiv, next_power_of_2
from kernels.tile_sizes import MIN_BLOCK, fitting, least_rows, tile_bytes
from kernels.triton_decode import decode
from kernels.triton_prefill import prefill
from kernels.triton_softmax import DecodeConfig, PrefillConfig, Rotated, float32_prefill_config
from kernels.tuning import Configs

MAX_RANK, MAX_ROPE = 512, 64  # elements of a latent and of a rotated key, as far as shared memory is counted
MAX_GROUP = 64  # heads that read a latent together: their results must fit into a program's registers
LATENT_DECODE_LIMITS = (4, 16, 1 << 20)  # most requests that a configuration is for
EXPANDED_BYTES = 128 << 20  # of keys and values that are made at once; a layer's may be gigabytes


def default_decode_config(_rank: int, group: int, _limit: int) -> DecodeConfig:
    """Return the configuration of sizes that no table has.

    Eight warps hold the results of 64 heads, and 16 heads of four warps would spill.
    """
    if group > 32:
        return DecodeConfig(block_n=32, num_warps=8, num_stages=3, programs_per_sm=1)
    return DecodeConfig(block_n=64, num_warps=8, num_stages=2, programs_per_sm=1)


def default_absorbed_config(_rank: int) -> PrefillConfig:
    """Return the configuration of sizes that no table has, of prompts and of prefixes that requests share."""
    return PrefillConfig(block_m=64, block_n=32, num_warps=8, num_stages=2)


def default_expanded_config(key_dim: int, value_dim: int) -> PrefillConfig:
    """Return the configuration of sizes that no table has; they are rounded up to powers of two."""
    return PrefillConfig(block_m=128, block_n=64 if max(key_dim, value_dim) <= 128 else 32, num_warps=8, num_stages=2)


# Keys: (rank, heads of a program, most requests), (rank), and (N, V), rounded up to powers of two.
DECODE_CONFIGS = Configs(
    "latent_decode",
    DecodeConfig,
    default_decode_config,
    lambda config, card, rank, group, _limit: fitting(
        config._replace(block_m=least_rows(card)), card, rank + MAX_ROPE, 0, rows=max(group, least_rows(card))
    ),
)
ABSORBED_CONFIGS = Configs(
    "latent_absorbed",
    PrefillConfig,
    default_absorbed_config,
    lambda config, card, rank: fitting(config, card, rank + MAX_ROPE, 0),
)
EXPANDED_CONFIGS = Configs(
    "latent_expanded",
    PrefillConfig,
    default_expanded_config,
    lambda config, card, key_dim, value_dim: fitting(config, card, key_dim + MAX_ROPE, value_dim),
)


class LatentConfigs(NamedTuple):
    """The configurations of both ways; or, of each, its table and its key there."""

    decode: Any
    absorbed: Any
    expanded: Any


def config_keys(num_heads: int, sizes: LatentSizes, num_decodes: int, device: torch.device) -> LatentConfigs:
    """Return the table and the key there of each configuration."""
    rank, group = next_power_of_2(sizes.rank), next_power_of_2(num_heads // num_groups(num_heads, device))
    limit = next(limit for limit in LATENT_DECODE_LIMITS if num_decodes <= limit)
    return LatentConfigs(
        decode=(DECODE_CONFIGS, (rank, group, limit)),
        absorbed=(ABSORBED_CONFIGS, (rank,)),
        expanded=(EXPANDED_CONFIGS, (next_power_of_2(sizes.key_dim), next_power_of_2(sizes.value_dim))),
    )


def latent_configs(q: torch.Tensor, sizes: LatentSizes, num_decodes: int) -> LatentConfigs:
    """Return the configurations for q [T, H, N + P]."""
    if q.dtype.itemsize == 4:
        rank, width = (next_power_of_2(size) + MAX_ROPE for size in (sizes.rank, sizes.key_dim))
        absorbed = float32_prefill_config(q.device, rank, 0)
        expanded = float32_prefill_config(q.device, width, next_power_of_2(sizes.value_dim))
        decode_config = DecodeConfig(16, 4, 1, 1, block_m=least_rows(card_of(q.device)))
        return LatentConfigs(decode_config, absorbed, expanded)
    keys = config_keys(q.shape[1], sizes, num_decodes, q.device)
    return LatentConfigs(*(configs.get(q.device, *key) for configs, key in keys))


@functools.cache
def num_groups(num_heads: int, device: torch.device, itemsize: int = 2) -> int:
    """Return into how many groups heads are cut, all of one size; each reads all latents.

    itemsize: of queries, which a group's program has in shared memory beside a tile of latents.
    """
    card, most = card_of(device), MAX_GROUP
    while most > least_rows(card):
        if tile_bytes(card, most, MIN_BLOCK, 1, MAX_RANK + MAX_ROPE, 0, itemsize) <= card.shared_bytes:
            break
        most //= 2
    return next(count for count in range(1, num_heads + 1) if num_heads % count == 0 and num_heads // count <= most)


def latent_attention_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    expansion: Expansion,
    batch: AttentionBatch,
    *,
    scale: float,
    configs: LatentConfigs | None = None,
) -> torch.Tensor:
    """Run `kernels.mla.latent_attention` in Triton. On one device it must not run on two streams at once.

    Prompts go the absorbed way where that is less work, and a CUDA graph's, whose contexts are unknown, where it is to
    serve any: see `kernels.latents.graph_room`.
    """
    out = q.new_empty(*q.shape[:2], expansion.sizes.value_dim)
    configs = configs or latent_configs(q, expansion.sizes, batch.num_decodes)
    has_prompts = batch.num_decodes < len(batch.rows)
    if batch.is_for_graph:
        is_absorbed = not graph_room(len(q) - batch.num_decodes)
    else:
        is_absorbed = not has_prompts or _prefer_absorbed(SameBatch(batch), expansion.sizes)
    if num_absorbed := len(q) if is_absorbed else batch.num_decodes:
        found = _absorbed(q[:num_absorbed], cache, expansion, batch, scale, configs)
        values_of(found, expansion, out[:num_absorbed])
    if not is_absorbed:
        _expanded(q, cache, expansion, batch, out, scale, configs.expanded)
    return out


@functools.lru_cache(maxsize=2)
def _prefer_absorbed(key: SameBatch, sizes: LatentSizes) -> bool:
    """Return whether a step's prompts together take fewer multiplications the absorbed way."""
    batch = key.batch
    lens = zip(batch.q_lens_host[batch.num_decodes :], batch.seq_lens_host[batch.num_decodes :], strict=True)
    return sum(sizes.saved_by_absorbing(int(q_len), int(seq_len)) for q_len, seq_len in lens) > 0


def _absorbed(
    q: torch.Tensor,
    cache: torch.Tensor,
    expansion: Expansion,
    batch: AttentionBatch,
    scale: float,
    configs: LatentConfigs,
) -> torch.Tensor:
    """Return the latents that single tokens, and prompts if they are in q too, find: [T, H, R]."""
    n, rank = expansion.sizes.key_dim, expansion.sizes.rank
    queries = absorb(q[..., :n], expansion)
    latents = cache[..., :rank].expand(-1, num_groups(q.shape[1], q.device, q.dtype.itemsize), -1)
    rotated = Rotated(q[..., n:], cache[:, 0, rank:])
    found = torch.empty_like(queries)
    if batch.num_decodes and hopper_latents.can_decode(queries, rotated, cache, batch):
        hopper_latents.decode(queries, rotated, cache, batch, found, scale=scale)
    elif batch.num_decodes:
        decode(
            queries, latents, latents, batch, found, scale=scale, rotated=rotated, config=configs.decode,
            prefix_config=configs.absorbed,
        )  # fmt: skip
    if len(q) > batch.num_decodes:
        prefill(queries, latents, latents, batch, found, scale=scale, rotated=rotated, config=configs.absorbed)
    return found


@dataclass(slots=True)
class _Piece:
    """Some of a step's prompts, whose contexts stand one after another: an `AttentionBatch`."""

    slots: torch.Tensor  # int32 [S], of the contexts
    rows: torch.Tensor  # int32 [B], where each context starts: in `slots`, and so in a table of one long line
    seq_lens: torch.Tensor
    cu_q_lens: torch.Tensor
    slot_table: torch.Tensor  # int32 [1, S], 0, 1, 2, ...; lines start at each of its elements
    q_lens_host: np.ndarray
    seq_lens_host: np.ndarray
    num_decodes: int = 0
    slot_map: torch.Tensor | None = None
    seen_until: torch.Tensor | None = None
    shared: SharedPrefixes | None = None
    is_for_graph: bool = False


@functools.lru_cache(maxsize=2)
def _pieces(key: SameBatch, num_tokens: int, most_tokens: int, most_prompts: int) -> list[_Piece]:
    """Cut a step's prompts into runs with contexts of at most `most_tokens`, if they are more than one.

    A graph's `num_tokens` of prompts stay together.
    """
    batch = key.batch
    lens, pieces, first = batch.seq_lens_host, [], batch.num_decodes
    if batch.is_for_graph:
        return [_piece(batch, first, len(lens), graph_room(num_tokens))]
    while first < len(lens):
        ends = np.cumsum(lens[first:])
        last = first + min(max(int(np.searchsorted(ends, most_tokens, side="right")), 1), most_prompts)
        pieces.append(_piece(batch, first, last, _few_sizes(int(lens[first:last].sum()))))
        first = last
    return pieces


def _few_sizes(num_tokens: int) -> int:
    """Return the next of eight sizes between powers of 2: for each libraries look for a kernel, and load it, anew."""
    step = 1 << max(num_tokens.bit_length() - 4, 0)
    return cdiv(num_tokens, step) * step


def _piece(batch: AttentionBatch, first: int, last: int, room: int) -> _Piece:
    """Put the contexts of prompts one after another into `room` slots, by what the device knows.

    The last token stands in all that are left: tiles of keys reach past the end, and what no row sees must be finite,
    which a slot of padding need not be.
    """
    seq_lens, rows = batch.seq_lens[first:last], batch.rows[first:last]
    ends = torch.cumsum(seq_lens, 0, dtype=torch.int32)
    starts = ends - seq_lens
    numbers = torch.arange(room, dtype=torch.int32, device=seq_lens.device)
    tokens = torch.minimum(numbers, ends[-1:] - 1)
    requests = torch.searchsorted(ends, tokens, right=True)
    positions = (tokens - starts[requests]).clamp_(min=0)  # of a rehearsal no token is real
    return _Piece(
        slots=batch.slot_table[rows[requests], positions],
        rows=starts,
        seq_lens=seq_lens,
        cu_q_lens=batch.cu_q_lens[first : last + 1],
        slot_table=numbers.as_strided((1, room), (1, 1)),
        q_lens_host=batch.q_lens_host[first:last],
        seq_lens_host=batch.seq_lens_host[first:last],
    )


def _expanded(
    q: torch.Tensor,
    cache: torch.Tensor,
    expansion: Expansion,
    batch: AttentionBatch,
    out: torch.Tensor,
    scale: float,
    config: PrefillConfig,
) -> None:
    """Write the attention of prompts into `out`: their contexts' keys and values are made.

    Of a context that is too long for `EXPANDED_BYTES` they are made for some heads at a time; for one at a time where
    each number of heads would be another kernel.
    """
    n, rank, num_heads = expansion.sizes.key_dim, expansion.sizes.rank, q.shape[1]
    head_bytes = (n + expansion.sizes.value_dim) * q.dtype.itemsize  # of a token
    is_hopper = rank % 8 == 0 and hopper_prefill.can_prefill_shared(q, expansion.sizes.value_dim, q.shape[2] - n)
    most_prompts = hopper_prefill.MAX_SHARED_REQUESTS if is_hopper else len(batch.rows)
    num_tokens = len(q) - batch.num_decodes
    for piece in _pieces(SameBatch(batch), num_tokens, EXPANDED_BYTES // (head_bytes * num_heads), most_prompts):
        latents = gather(cache, piece.slots, q.dtype)[:, 0]
        num_parts = cdiv(head_bytes * num_heads * len(latents), EXPANDED_BYTES)
        step = num_heads if num_parts == 1 else cdiv(num_heads, num_parts) if is_hopper else 1
        for first in range(0, num_heads, step):
            heads = slice(first, first + step)
            part = expansion.of_heads(heads)
            made = F.linear(latents[:, :rank], part.weight).unflatten(1, (part.num_heads, -1))
            keys, values, rotated = made[..., :n], made[..., n:], latents[:, rank:]
            if is_hopper:
                hopper_prefill.prefill(
                    q[:, heads], keys, values, piece, out[:, heads], scale=scale, shared_keys=rotated
                )
            else:
                prefill(
                    q[:, heads, :n], keys, values, piece, out[:, heads], scale=scale,
                    rotated=Rotated(q[:, heads, n:], rotated), config=config,
                )  # fmt: skip

"""Parts that the Triton attention kernels share: a running softmax over tiles of the paged cache, and launching.

The query heads of one KV head are rows of one tile (GQA packed in M), so keys and values are read once for all of them.
Scores are kept in units of log2, for exp2. The definition is `kernels.attention.attention_torch`.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.card import Card, card_of
from kernels.launch import next_power_of_2
from kernels.tile_sizes import MIN_BLOCK, fitting
from kernels.triton_elementwise import launch_options
from kernels.tuning import Configs

LOG2_E = 1.4426950408889634


class DecodeConfig(NamedTuple):
    """Say how `decode` cuts its work."""

    block_n: int  # tokens a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int
    has_prefetch: bool = False  # bring a program's first tile to the L2 cache before the kernel ahead has ended
    block_m: int = MIN_BLOCK  # heads of a tile at least


class PrefillConfig(NamedTuple):
    """Say how `prefill`, and `decode` for shared prefixes, cut their work."""

    block_m: int  # queries x heads of a KV head
    block_n: int
    num_warps: int
    num_stages: int


def default_prefill_config(block_d: int) -> PrefillConfig:
    """Return the configuration of sizes that no table has; block_d: head_dim, rounded up to a power of two."""
    num_warps = 4 if block_d <= 256 else 8  # whose registers hold the results
    return PrefillConfig(block_m=64, block_n=64 if block_d <= 128 else 32, num_warps=num_warps, num_stages=2)


def fitting_prefill_config(config: PrefillConfig, card: Card, block_d: int) -> PrefillConfig:
    """Return a configuration that `card` has room for."""
    return fitting(config, card, block_d, block_d)


@functools.cache
def float32_prefill_config(device: torch.device, block_d: int, value_width: int) -> PrefillConfig:
    """Return the configuration for float32, which is served by no table."""
    config = PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=1)
    return fitting(config, card_of(device), block_d, value_width, itemsize=4)


def prefill_config(configs: Configs[PrefillConfig], q: torch.Tensor) -> PrefillConfig:
    """Return the configuration for queries q [T, H, D] by a table whose key is the power of two from D on."""
    if q.dtype.itemsize == 4:
        return float32_prefill_config(q.device, next_power_of_2(q.shape[2]), next_power_of_2(q.shape[2]))
    return configs.get(q.device, next_power_of_2(q.shape[2]))


class Rotated(NamedTuple):
    """The part of queries and keys that stands apart and is rotated, where keys' parts are the same for all heads."""

    q: torch.Tensor  # [T, H, P]
    k: torch.Tensor  # [num_slots, P]


NOT_ROTATED = (0,) * 5
MIN_DOT_SIZE = 16  # of each side of a product of tiles


def launch_settings(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotated: Rotated | None,
    window: int,
    is_chunked: bool,
    softcap: float,
    config: DecodeConfig | PrefillConfig,
) -> dict[str, Any]:
    """Return the keyword arguments that all three kernels are compiled for and launched with."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, v_dim = k_cache.shape[1], v_cache.shape[2]
    group = num_heads // num_kv_heads
    strides = NOT_ROTATED
    if rotated is not None:
        rope_dim = rotated.k.shape[1]
        strides = (
            rope_dim,
            max(next_power_of_2(rope_dim), MIN_DOT_SIZE),
            rotated.k.stride(0),
            rotated.q.stride(0),
            rotated.q.stride(1),
        )
    return {
        "Q_STRIDE": q.stride(0),
        "Q_HEAD_STRIDE": q.stride(1),
        "K_STRIDE": k_cache.stride(0),
        "K_HEAD_STRIDE": k_cache.stride(1),
        "V_STRIDE": v_cache.stride(0),
        "V_HEAD_STRIDE": v_cache.stride(1),
        "ROPE_DIM": strides[0],
        "BLOCK_ROPE": strides[1],
        "K_ROPE_STRIDE": strides[2],
        "Q_ROPE_STRIDE": strides[3],
        "Q_ROPE_HEAD_STRIDE": strides[4],
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "HAS_WINDOW": 0 if window < 0 else 1 + is_chunked,
        "SOFTCAP": softcap * LOG2_E,
        "BLOCK_GROUP": next_power_of_2(group),
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_V": next_power_of_2(v_dim),
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_stages": config.num_stages,
        **launch_options(q.device, config.num_warps),
    }


def block_requests(num_requests: int) -> int:
    """Return a power of two that holds them; few different ones, since each compiles its own kernel."""
    return next((block for block in (16, 256) if num_requests <= block), max(1024, next_power_of_2(num_requests)))


# Views of a step's staging buffer start anywhere and counts vary: none of it is worth compiling a kernel again.
attention_kernel = triton.jit(
    do_not_specialize=[
        "num_requests", "num_splits", "num_groups", "first_partial", "table_stride", "window", "is_beside",
        "min_split_len", "num_programs",
    ],
    do_not_specialize_on_alignment=[
        "seq_lens", "rows", "cu_q_lens", "own_starts", "prefix_lens", "cu_members", "members",
    ],
)  # fmt: skip


@triton.jit
def first_seen(position, window, HAS_WINDOW: tl.constexpr):
    """Return the first token that the one at `position` sees, which may be negative. HAS_WINDOW: 2 if it is chunked."""
    if HAS_WINDOW == 2:
        return position // window * window
    else:
        return position - window + 1


@triton.jit
def load_slots(slots, slot_map, first, least, seq_len, BLOCK_N: tl.constexpr):
    """Load the slots of tokens first, first + 1, ...; past the end the last one's.

    Some slot must be read there, and the last one's values are finite. So are those of `least`, the first token that
    is seen: where there is a map, what stands before it may be another request's.
    """
    token = tl.minimum(first + tl.arange(0, BLOCK_N), seq_len - 1)
    if slot_map is None:
        slot = tl.load(slots + token)
    else:
        slot = tl.load(slot_map + tl.load(slots + tl.maximum(token, least)))
    return slot


@triton.jit
def load_rotated(
    q_rope,
    token,
    head,
    is_row,
    ROPE_DIM: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
):
    """Load the rotated parts of queries that stand apart, [M, BLOCK_ROPE]."""
    r = tl.arange(0, BLOCK_ROPE)
    pointers = q_rope + (token * STRIDE + head * HEAD_STRIDE)[:, None] + r[None, :]
    return tl.load(pointers, mask=is_row[:, None] & (r < ROPE_DIM)[None, :], other=0.0)


@triton.jit
def load_rows(cache, offset, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load the rows `offset` [N, 1] of a cache of one head, [N, BLOCK]."""
    d = tl.arange(0, BLOCK)
    if DIM == BLOCK:
        rows = tl.load(cache + offset * STRIDE + d[None, :])
    else:
        rows = tl.load(cache + offset * STRIDE + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    return rows


@triton.jit
def beside_bytes(x, cache):
    """Return x, to be multiplied with numbers of `cache`, as float16 if these have 8 bits: it holds them, too.

    One instruction converts two of them; to bfloat16 it takes four.
    """
    if cache.dtype.element_ty.primitive_bitwidth == 8 and x.dtype == tl.bfloat16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return x


@triton.jit
def attend(
    q,
    q_rope,
    m,
    l,
    acc,
    k_cache,
    k_rope,
    v_cache,
    slots,
    slot_map,
    slot,
    first,
    last,
    seq_len,
    row_first,
    row_last,
    row_slope,
    qk_scale,
    K_STRIDE: tl.constexpr,
    K_ROPE_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAZY_SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add tokens [first, last) of a sequence to the running softmax (m, l, acc) of q [M, D] and q_rope [M, P] or None.

    k_cache and v_cache point at the KV head; v_cache is None where values are keys, without the keys' parts at k_rope,
    which belong to q_rope and are the same for all heads. `slots` points at the sequence's line of the slot table;
    `slot` [BLOCK_N] is what stands there at `first`: the pipeliner would spend its stages on slots and leave few to
    keys and values, so they are loaded a tile ahead by hand. Row r sees tokens row_first[r] to row_last[r], which are
    looked at if IS_MASKED (and HAS_WINDOW, for row_first). row_slope [M], or None: what scores lose with each token of
    distance from row_last. With LAZY_SUM l is [M, BLOCK_N], summed by the caller: a sum over columns that several warps
    hold costs two barriers.
    """
    n = tl.arange(0, BLOCK_N)
    # Values are summed over tokens, so a thread's registers want numbers of several tokens side by side: single bytes
    # would be gathered one by one, and pairs are turned around on the way from shared memory. Of single tokens alone:
    # prompts' products are bound by other things.
    HAS_PAIRS: tl.constexpr = (
        LAZY_SUM and k_cache.dtype.element_ty.primitive_bitwidth == 8 and v_cache is not None and BLOCK_V >= 32
    )
    if HAS_PAIRS:
        q = beside_bytes(q, k_cache)
        if q_rope is not None:
            q_rope = beside_bytes(q_rope, k_cache)
        v_pairs = v_cache.to(tl.pointer_type(tl.int16), bitcast=True)
        even, odd = tl.split(tl.reshape(acc, acc.shape[0], BLOCK_V // 2, 2))
    for start in range(first, last, BLOCK_N):
        token = start + n
        next_slot = load_slots(slots, slot_map, start + BLOCK_N, 0, seq_len, BLOCK_N)
        offset = slot.to(tl.int64)[:, None]
        k = load_rows(k_cache, offset, K_STRIDE, HEAD_DIM, BLOCK_D).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if q_rope is not None:
            rotated = load_rows(k_rope, offset, K_ROPE_STRIDE, ROPE_DIM, BLOCK_ROPE).to(q.dtype)
            scores = tl.dot(q_rope, tl.trans(rotated), scores, input_precision=PRECISION)
        if SOFTCAP > 0:
            # tanh(x) = 2 sigmoid(2 x) - 1; SOFTCAP and qk_scale are both in units of log2.
            scores = SOFTCAP * (2 * tl.sigmoid(scores * (2 * qk_scale / SOFTCAP)) - 1)
            scale = 1.0
        else:
            scale = qk_scale
        if row_slope is not None:
            scores = scores * scale - row_slope[:, None] * (row_last[:, None] - token[None, :]).to(tl.float32)
            scale = 1.0
        if IS_MASKED:
            is_seen = token[None, :] <= row_last[:, None]
            if HAS_WINDOW:
                is_seen &= token[None, :] >= row_first[:, None]
            scores = tl.where(is_seen, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, axis=1) * scale)
        if HAS_WINDOW:
            new_m = tl.where(new_m == float("-inf"), -1e30, new_m)  # a row that has seen nothing yet
        p = tl.exp2(scores * scale - new_m[:, None])
        alpha = tl.exp2(m - new_m)
        if LAZY_SUM:
            l = l * alpha[:, None] + p
        else:
            l = l * alpha + tl.sum(p, axis=1)
        if HAS_PAIRS:
            pairs = load_rows(v_pairs, offset, V_STRIDE // 2, V_DIM // 2, BLOCK_V // 2)
            first_v = (pairs & 0xFF).to(tl.int8).to(v_cache.dtype.element_ty, bitcast=True).to(q.dtype)
            second_v = (pairs >> 8).to(tl.int8).to(v_cache.dtype.element_ty, bitcast=True).to(q.dtype)
            even = tl.dot(p.to(q.dtype), first_v, even * alpha[:, None], input_precision=PRECISION)
            odd = tl.dot(p.to(q.dtype), second_v, odd * alpha[:, None], input_precision=PRECISION)
        else:
            acc = acc * alpha[:, None]
            if v_cache is None:
                v = k
            else:
                v = load_rows(v_cache, offset, V_STRIDE, V_DIM, BLOCK_V).to(q.dtype)
            acc = tl.dot(p.to(q.dtype), v, acc, input_precision=PRECISION)
        m = new_m
        slot = next_slot
    if HAS_PAIRS:
        acc = tl.interleave(even, odd)
    return m, l, acc


@triton.jit
def attend_prompt(
    q,
    q_rope,
    k_cache,
    k_rope,
    v_cache,
    slots,
    slot_map,
    first,
    whole,
    last,
    seq_len,
    row_first,
    row_last,
    row_slope,
    qk_scale,
    K_STRIDE: tl.constexpr,
    K_ROPE_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return (m, l, acc) of q over tokens [first, last); without a window all rows see those before `whole`."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    masked = first
    if not HAS_WINDOW:
        masked = whole
        slot = load_slots(slots, slot_map, first, 0, seq_len, BLOCK_N)
        m, l, acc = attend(
            q, q_rope, m, l, acc, k_cache, k_rope, v_cache, slots, slot_map, slot, first, whole, seq_len, row_first,
            row_last, row_slope, qk_scale, K_STRIDE, K_ROPE_STRIDE, V_STRIDE, HEAD_DIM, ROPE_DIM, V_DIM, False, False,
            SOFTCAP, False, BLOCK_N, BLOCK_D, BLOCK_ROPE, BLOCK_V, PRECISION,
        )  # fmt: skip
    least = masked
    if HAS_WINDOW:
        least = tl.maximum(tl.min(row_first, axis=0), masked)
    slot = load_slots(slots, slot_map, masked, least, seq_len, BLOCK_N)
    return attend(
        q, q_rope, m, l, acc, k_cache, k_rope, v_cache, slots, slot_map, slot, masked, last, seq_len, row_first,
        row_last, row_slope, qk_scale, K_STRIDE, K_ROPE_STRIDE, V_STRIDE, HEAD_DIM, ROPE_DIM, V_DIM, True, HAS_WINDOW,
        SOFTCAP, False, BLOCK_N, BLOCK_D, BLOCK_ROPE, BLOCK_V, PRECISION,
    )  # fmt: skip


@triton.jit
def share_beside_sink(lse, sinks, head, is_head):
    """Return the share of the softmax that tokens have beside the sink of `head`: 1 / (1 + exp(sink) / exp(lse)).

    lse: of the tokens' scores, in units of log2. A result without the sink is multiplied by it, once all parts are in.
    """
    sink = tl.load(sinks + head, mask=is_head, other=float("-inf")).to(tl.float32) * 1.4426950408889634  # LOG2_E
    return 1 / (1 + tl.exp2(sink - lse))


@triton.jit
def load_slopes(slopes, head, is_head):
    """Load the slopes of heads `head` in units of log2."""
    return tl.load(slopes + head, mask=is_head, other=0.0) * 1.4426950408889634  # LOG2_E


@triton.jit
def find(ends, work):
    """Return (index, where it starts) of the entry whose run of work, ended by `ends` [N] (ascending), holds `work`."""
    is_before = ends <= work
    return tl.sum(is_before.to(tl.int32), axis=0), tl.max(tl.where(is_before, ends, 0), axis=0)


@triton.jit
def part_len(prefix_len, num_splits, BLOCK_N: tl.constexpr):
    """Return the tokens of a prefix in each of its parts but the last: whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(prefix_len, num_splits), BLOCK_N), 1) * BLOCK_N

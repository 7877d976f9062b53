"""Attention of prompts in Triton: any number of tokens of each request, behind any context."""

import torch
import triton
import triton.language as tl

from kernels.attention_batch import AttentionBatch
from kernels.launch import arrival_counters, cdiv, fast_launch, next_power_of_2, num_sms
from kernels.triton_softmax import (
    LOG2_E,
    PrefillConfig,
    Rotated,
    attend_prompt,
    attention_kernel,
    block_requests,
    default_prefill_config,
    find,
    first_seen,
    fitting_prefill_config,
    launch_settings,
    load_rotated,
    load_slopes,
    part_len,
    prefill_config,
    share_beside_sink,
)
from kernels.tuning import Configs

# By (head_dim, rounded up to a power of two).
PREFILL_CONFIGS = Configs("prefill", PrefillConfig, default_prefill_config, fitting_prefill_config)
PREFILL_PROGRAMS_PER_SM = 2
MAX_PREFILL_SPLITS = 8
MAX_SPLIT_PROMPTS = 16  # prompts whose contexts are cut; more of them fill the chip uncut
MIN_SPLIT_LEN = 512  # tokens of context that are worth a program of their own while the device has places left
MIN_WAVE_SPLIT_LEN = 4096  # tokens of context that are worth one where all places are taken
MAX_SPLIT_WAVES = 4  # waves of programs above which a last one that is hardly filled costs little
SAME_WAVES = 1.08  # ratio of waves that is not worth more parts, which have to be merged


def prefill(
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
    rotated: Rotated | None = None,
    config: PrefillConfig | None = None,
    num_splits: int | None = None,
    min_split_len: int = MIN_SPLIT_LEN,
) -> None:
    """Write the attention of the tokens after the first num_decodes, any number of each request, into `out`.

    Where they do not fill the chip, or fill it a last time badly, their context is cut into up to `num_splits` parts;
    the last program to have attended to its part merges them. How many there are depends on the context, which only the
    device knows in a captured graph.

    rotated: parts of queries and keys beside q and k_cache; it is as if they stood behind these. Caches of several
    heads may be one head's, expanded, and v_cache may be k_cache itself, which then is read once.
    """
    num_requests = len(batch.rows) - batch.num_decodes
    num_kv_heads = k_cache.shape[1]
    block_group = next_power_of_2(q.shape[1] // num_kv_heads)
    config = config or prefill_config(PREFILL_CONFIGS, q)
    block_m = max(config.block_m, block_group)
    num_tokens = q.shape[0] - batch.num_decodes
    num_programs = (num_tokens // (block_m // block_group) + num_requests) * num_kv_heads  # at most
    if window >= 0 or num_requests > MAX_SPLIT_PROMPTS:  # with a window there is little context
        num_splits = 1
    elif num_splits is None:
        num_expected = cdiv(num_tokens, block_m // block_group) * num_kv_heads  # mostly it is one prompt
        num_splits, min_split_len = prefill_splits(num_expected, PREFILL_PROGRAMS_PER_SM * num_sms(q.device))
    partial = partial_lse = arrivals = None
    if num_splits > 1:
        num_rows = num_programs * num_splits * block_m
        partial = torch.empty(num_rows, v_cache.shape[2], dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(num_rows, dtype=torch.float32, device=q.device)
        arrivals = arrival_counters(q.device, num_programs)
    settings = launch_settings(q, k_cache, v_cache, rotated, window, is_chunked, softcap, config)
    _prefill_kernel[(num_programs, num_splits)](
        q,
        None if rotated is None else rotated.q,
        k_cache,
        None if rotated is None else rotated.k,
        None if v_cache is k_cache else v_cache,
        out,
        batch.seq_lens[batch.num_decodes :],
        batch.cu_q_lens[batch.num_decodes :],
        batch.rows[batch.num_decodes :],
        batch.slot_table,
        batch.slot_map,
        batch.seen_until,
        sinks,
        slopes,
        partial,
        partial_lse,
        arrivals,
        num_requests,
        batch.slot_table.stride(0),
        window,
        min_split_len,
        scale * LOG2_E,
        **settings,
        OUT_STRIDE=out.stride(0),
        BLOCK_B=block_requests(num_requests),
        BLOCK_M=block_m,
    )


def prefill_splits(num_programs: int, num_places: int) -> tuple[int, int]:
    """Return (most parts that a prompt's context is cut into, tokens of context that are worth a part).

    num_programs: for uncut contexts; num_places: how many programs the device runs at once. With 288 on 264 places the
    second wave would keep 24 of them as busy as the first one all.
    """
    num_fitting = num_places // max(num_programs, 1)
    if num_fitting > 1:
        return min(num_fitting, MAX_PREFILL_SPLITS), MIN_SPLIT_LEN
    if num_programs > MAX_SPLIT_WAVES * num_places:
        return 1, MIN_SPLIT_LEN
    waves = {splits: cdiv(num_programs * splits, num_places) / splits for splits in range(1, MAX_PREFILL_SPLITS + 1)}
    good_enough = SAME_WAVES * min(waves.values())
    return next(splits for splits in waves if waves[splits] <= good_enough), MIN_WAVE_SPLIT_LEN


@fast_launch
@attention_kernel
def _prefill_kernel(
    q,
    q_rope,
    k_cache,
    k_rope,
    v_cache,
    out,
    seq_lens,
    cu_q_lens,
    rows,
    slot_table,
    slot_map,
    seen_until,
    sinks,
    slopes,
    partial,
    partial_lse,
    arrivals,
    num_requests,
    table_stride,
    window,
    min_split_len,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    K_ROPE_STRIDE: tl.constexpr,
    Q_ROPE_STRIDE: tl.constexpr,
    Q_ROPE_HEAD_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // BLOCK_GROUP
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    i = tl.arange(0, BLOCK_B)
    is_request = i < num_requests
    # All requests' figures at once, though one is wanted: loads that wait for each other take longer than sums.
    q_begins = tl.load(cu_q_lens + i, mask=is_request, other=0)
    q_ends = tl.load(cu_q_lens + i + 1, mask=is_request, other=0)
    all_lens = tl.load(seq_lens + i, mask=is_request, other=0)
    all_rows = tl.load(rows + i, mask=is_request, other=0)
    ends = tl.cumsum((q_ends - q_begins + BLOCK_TOKENS - 1) // BLOCK_TOKENS, axis=0)
    # The last tiles of a prompt see the most: they start first, so that they do not end last.
    tile = tl.max(ends, axis=0) - 1 - tl.program_id(0) // NUM_KV_HEADS
    request, request_begin = find(ends, tile)
    q_begin = tl.sum(tl.where(i == request, q_begins, 0), axis=0)
    q_len = tl.sum(tl.where(i == request, q_ends, 0), axis=0) - q_begin
    seq_len = tl.sum(tl.where(i == request, all_lens, 0), axis=0)
    row = tl.sum(tl.where(i == request, all_rows, 0), axis=0)
    first_q = (tile - request_begin) * BLOCK_TOKENS
    first_position = seq_len - q_len + first_q
    last = tl.minimum(first_position + BLOCK_TOKENS, seq_len)
    if seen_until is not None:
        index = first_q + tl.arange(0, BLOCK_TOKENS)
        until = tl.load(seen_until + q_begin + index, mask=(index >= 0) & (index < q_len), other=0)
        last = tl.maximum(last, tl.max(until, axis=0))
    whole = (first_position + 1) // BLOCK_N * BLOCK_N  # tokens that all rows see
    first = seq_len * 0
    if HAS_WINDOW:
        first = tl.maximum(first_seen(first_position, window, HAS_WINDOW), 0) // BLOCK_N * BLOCK_N
    split = tl.program_id(1)
    num_splits = first * 0 + 1
    if partial is not None:
        most_splits = tl.minimum(tl.num_programs(1), tl.maximum(whole // min_split_len, 1))
        split_len = part_len(whole, most_splits, BLOCK_N)
        num_splits = tl.maximum(tl.cdiv(whole, split_len), 1)
        first = split * split_len
        if split < num_splits - 1:  # the last part has the tokens that not all rows see
            last = first + split_len
            whole = last
    if (tile >= 0) & (split < num_splits):
        if PDL:
            tl.extra.cuda.gdc_wait()
        m_rows = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        v_columns = tl.arange(0, BLOCK_V)
        q_index = first_q + m_rows // BLOCK_GROUP
        head = kv_head * GROUP + m_rows % BLOCK_GROUP
        is_row = (q_index < q_len) & (m_rows % BLOCK_GROUP < GROUP)
        token = (q_begin + q_index).to(tl.int64)
        q_row = token * Q_STRIDE + head * Q_HEAD_STRIDE
        q_tile = tl.load(q + q_row[:, None] + d[None, :], mask=is_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        is_column = (v_columns < V_DIM)[None, :]
        is_element = is_row[:, None] & is_column

        row_last = seq_len - q_len + q_index
        row_first = row_last
        if HAS_WINDOW:
            row_first = first_seen(row_last, window, HAS_WINDOW)
        if seen_until is not None:
            row_last = tl.load(seen_until + token, mask=is_row, other=1) - 1
        slots = slot_table + row.to(tl.int64) * table_stride
        m, l, acc = attend_prompt(
            q_tile,
            None
            if q_rope is None
            else load_rotated(q_rope, token, head, is_row, ROPE_DIM, BLOCK_ROPE, Q_ROPE_STRIDE, Q_ROPE_HEAD_STRIDE),
            k_cache + kv_head * K_HEAD_STRIDE,
            k_rope,
            None if v_cache is None else v_cache + kv_head * V_HEAD_STRIDE,
            slots,
            slot_map,
            first,
            whole,
            last,
            seq_len,
            row_first,
            row_last,
            None if slopes is None else load_slopes(slopes, head, is_row),
            qk_scale,
            K_STRIDE,
            K_ROPE_STRIDE,
            V_STRIDE,
            HEAD_DIM,
            ROPE_DIM,
            V_DIM,
            HAS_WINDOW,
            SOFTCAP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_ROPE,
            BLOCK_V,
            PRECISION,
        )
        result = acc / l[:, None]
        out_row = token * OUT_STRIDE + head * V_DIM
        out_pointers = out + out_row[:, None] + v_columns[None, :]
        if num_splits == 1:
            if sinks is not None:
                result *= share_beside_sink(m + tl.log2(l), sinks, head, is_row)[:, None]
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=is_element)
        elif partial is not None:
            first_row = tl.program_id(0) * tl.num_programs(1) * BLOCK_M
            part = first_row + split * BLOCK_M + m_rows
            tl.store(partial + part[:, None] * V_DIM + v_columns[None, :], result, mask=is_column)
            tl.store(partial_lse + part, m + tl.log2(l))
            tl.debug_barrier()  # all threads' parts of the result are written before its arrival counts
            arrival = arrivals + tl.program_id(0)
            if tl.atomic_add(arrival, 1, sem="acq_rel") == num_splits - 1:
                tl.store(arrival, 0)
                merged, lse = _merge(partial, partial_lse, first_row, num_splits, V_DIM, BLOCK_M, BLOCK_V)
                if sinks is not None:
                    merged *= share_beside_sink(lse, sinks, head, is_row)[:, None]
                tl.store(out_pointers, merged.to(out.dtype.element_ty), mask=is_element)


@triton.jit
def _merge(
    partial, partial_lse, first_row, num_splits, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Merge the results of a tile's parts, which lie one after another.

    Returns them, [BLOCK_M, BLOCK_V], and their log-sum-exps, [BLOCK_M]. Loads bypass the L1 cache, which may
    hold older values.
    """
    m_rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_V)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for split in range(num_splits):
        row = first_row + split * BLOCK_M + m_rows
        lse = tl.load(partial_lse + row, cache_modifier=".cg")
        pointers = partial + row[:, None] * V_DIM + d[None, :]
        values = tl.load(pointers, mask=(d < V_DIM)[None, :], other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(m, lse)
        weight = tl.exp2(lse - new_m)
        alpha = tl.exp2(m - new_m)
        l = l * alpha + weight
        acc = acc * alpha[:, None] + values * weight[:, None]
        m = new_m
    return acc / l[:, None], m + tl.log2(l)

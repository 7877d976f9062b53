"""Attention of single tokens in Triton, with the prefixes that requests share read once."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kernels.attention_batch import AttentionBatch, HeadRotation, SharedPrefixes
from kernels.launch import arrival_counters, cdiv, fast_launch, next_power_of_2, num_sms
from kernels.tile_sizes import MIN_BLOCK, fitting
from kernels.triton_elementwise import launch_options, prefetch_to_l2, store_in_cache
from kernels.triton_softmax import (
    LOG2_E,
    DecodeConfig,
    PrefillConfig,
    Rotated,
    attend,
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
    load_slots,
    part_len,
    prefill_config,
    share_beside_sink,
)
from kernels.tuning import Configs

MOST_MERGED_LATER = 4  # requests
MOST_MERGED_PARTS, MOST_MERGED_COLUMNS, MERGED_VALUES = 256, 128, 8192  # that a program of `_merge_kernel` holds

# Most requests that a configuration is for. A few are made for latency, some to fill the chip; where programs have
# several requests each, more of them at once hide what each begins with. The last two: of requests with 8 KV heads.
DECODE_LIMITS = (4, 16, 64, 1 << 20)
LIMITED_KV_HEADS = 8


def default_decode_config(block_d: int) -> DecodeConfig:
    """Return the configuration of sizes that no table has; block_d: head_dim, rounded up to a power of two."""
    return DecodeConfig(block_n=64 if block_d <= 128 else 32, num_warps=4, num_stages=3, programs_per_sm=2)


def _decode_configs(kind: str) -> Configs[DecodeConfig]:
    return Configs(
        kind,
        DecodeConfig,
        lambda block_d, _max_requests: default_decode_config(block_d),
        lambda config, card, block_d, _max_requests: fitting(config, card, block_d, block_d, rows=MIN_BLOCK),
    )


# Keys: (head_dim rounded up to a power of two, most requests), and (head_dim rounded up to a power of two).
DECODE_CONFIGS = _decode_configs("decode")
DECODE_BYTES_CONFIGS = _decode_configs("decode_bytes")  # of caches of 8 bits: tiles take half the room
PREFIX_CONFIGS = Configs("prefix", PrefillConfig, default_prefill_config, fitting_prefill_config)


def decode_limit(num_requests: int, num_kv_heads: int) -> int:
    """Return the one of `DECODE_LIMITS` that counts for so many requests."""
    few, some, many, most = DECODE_LIMITS
    if num_requests <= some:
        return few if num_requests <= few else some
    return many if num_requests * num_kv_heads <= many * LIMITED_KV_HEADS else most


def decode_config(q: torch.Tensor, num_requests: int, k_cache: torch.Tensor) -> DecodeConfig:
    """Return the configuration for single tokens q [T, H, D] of `num_requests`, and a cache [num_slots, Hkv, D]."""
    if q.dtype.itemsize == 4:
        return DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs_per_sm=2)
    configs = DECODE_BYTES_CONFIGS if k_cache.dtype.itemsize == 1 else DECODE_CONFIGS
    return configs.get(q.device, next_power_of_2(q.shape[2]), decode_limit(num_requests, k_cache.shape[1]))


def decode(
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
    rotation: HeadRotation | None = None,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
    num_free_sms: int = 0,
    launch_beside: Callable[[], None] | None = None,
    prefix_config: PrefillConfig | None = None,
    num_prefix_splits: int | None = None,
) -> None:
    """Write the attention of the first num_decodes tokens into `out`, which stays as it is for padding, of length 0.

    Every program takes an equal run of the tiles of all requests and heads ("stream-K", Osama et al. 2023), so that
    any mix of lengths fills the chip. Where a run starts or ends inside a request, the program leaves a partial
    result, and the last to arrive at a request merges them: no second kernel, and none of this for whole requests. But
    the latents of a few requests, of which programs leave many wide results, have a second kernel for that.
    On Hopper lengths and slots are read before the kernel ahead has ended, which must not be the one to write them.

    launch_beside: on Hopper, launches a kernel to run beside this one, on all but `num_free_sms` multiprocessors: as
    `gated_gemm` does, it begins when all before it has ended, and lets the next one begin at once. rotated, and which
    caches there may be: see `kernels.triton_prefill.prefill`.

    rotation: q [T, H, D] is the first part of products [T, (H + 2 Hkv) D], and what `rope_and_store` does with them is
    done here, the writing included, which costs few tokens less than a kernel of its own. Without shared prefixes.
    """
    num_requests = batch.num_decodes
    v_dim, num_kv_heads = v_cache.shape[2], k_cache.shape[1]
    block_group = next_power_of_2(q.shape[1] // num_kv_heads)
    config = config or decode_config(q, num_requests, k_cache)
    num_programs = num_programs or config.programs_per_sm * (num_free_sms or num_sms(q.device))
    shared = batch.shared
    num_splits = 0
    if shared is not None:
        prefix_config = prefix_config or prefill_config(PREFIX_CONFIGS, q)
        num_tiles = cdiv(num_requests * block_group, prefix_config.block_m)
        num_splits = num_prefix_splits or max(1, min(16, 2 * num_sms(q.device) // (num_tiles * num_kv_heads)))
    # A program leaves at most two partial results: of the request it starts in and of the one it ends in.
    num_partials = 2 * num_programs + num_splits * num_requests * num_kv_heads
    partial = torch.empty(num_partials, block_group, v_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(num_partials, block_group, dtype=torch.float32, device=q.device)
    if shared is not None:
        assert prefix_config is not None
        _prefix_partials(
            q, k_cache, v_cache, rotated, batch, shared, partial, partial_lse, 2 * num_programs, num_splits, scale,
            window, is_chunked, softcap, slopes, prefix_config,
        )  # fmt: skip
    # Beside a prefix's parts each request leaves a result, and a program has room for two: they are merged at once.
    is_merged_later = rotated is not None and shared is None and num_requests <= MOST_MERGED_LATER
    # Few requests are cut into many parts, whose merging is part of the latency; many requests need the registers
    # for more programs on an SM.
    merge_registers = 0 if is_merged_later else 64 if num_requests <= 4 else 32
    settings = launch_settings(q, k_cache, v_cache, rotated, window, is_chunked, softcap, config)
    if launch_beside is not None:
        launch_beside()
    _decode_kernel[(num_programs,)](
        q,
        None if rotated is None else rotated.q,
        k_cache,
        None if rotated is None else rotated.k,
        None if v_cache is k_cache else v_cache,
        out,
        batch.seq_lens,
        batch.rows,
        batch.slot_table,
        batch.slot_map,
        sinks,
        slopes,
        shared.own_starts if shared is not None else None,
        *(rotation or (None, None, None, None, 0.0)),
        partial,
        partial_lse,
        arrival_counters(q.device, num_requests * num_kv_heads),
        num_requests,
        num_splits,
        batch.slot_table.stride(0),
        window,
        int(launch_beside is not None),
        scale * LOG2_E,
        **settings,
        OUT_STRIDE=out.stride(0),
        HALF=0 if rotation is None else rotation.cos_sin.shape[1] // 2,
        CACHE_MAX=torch.finfo(k_cache.dtype).max if k_cache.dtype.itemsize == 1 else None,
        BLOCK_B=block_requests(num_requests),
        BLOCK_M=max(config.block_m, block_group),
        BLOCK_P=max(1, merge_registers * 32 * config.num_warps // (block_group * next_power_of_2(v_dim))),
        PREFIX_BLOCK_N=prefix_config.block_n if prefix_config is not None else 1,
        HAS_PREFETCH=settings["PDL"] and config.has_prefetch,
        IS_MERGED_LATER=is_merged_later,
    )
    if is_merged_later:
        merge_parts(partial, partial_lse, batch, out, num_kv_heads, num_programs=num_programs, block_n=config.block_n)


def merge_parts(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    num_kv_heads: int = 1,
    *,
    num_programs: int,
    block_n: int,
) -> None:
    """Write what programs left of a few requests, whose tiles of block_n tokens were dealt out evenly, into `out`.

    partial [2 * num_programs, heads of a KV head, rounded up to a power of two, V], as `decode` has it.
    """
    num_requests, (num_heads, v_dim) = batch.num_decodes, out.shape[1:]
    num_parts = min(next_power_of_2(cdiv(num_programs, num_requests) + 1), MOST_MERGED_PARTS)  # of alike requests
    num_columns = min(MERGED_VALUES // num_parts, MOST_MERGED_COLUMNS)
    _merge_kernel[(num_requests * num_heads, cdiv(v_dim, num_columns))](
        out,
        batch.seq_lens,
        partial,
        partial_lse,
        num_requests,
        num_programs,
        OUT_STRIDE=out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        V_DIM=v_dim,
        BLOCK_B=block_requests(num_requests),
        BLOCK_GROUP=partial.shape[1],
        BLOCK_N=block_n,
        BLOCK_P=num_parts,
        BLOCK_V=num_columns,
        **launch_options(out.device, num_warps=4),
    )


def _prefix_partials(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotated: Rotated | None,
    batch: AttentionBatch,
    shared: SharedPrefixes,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    first_partial: int,
    num_splits: int,
    scale: float,
    window: int,
    is_chunked: bool,
    softcap: float,
    slopes: torch.Tensor | None,
    config: PrefillConfig,
) -> None:
    """Compute the attention of each group's members to its prefix, in `num_splits` parts; `decode` merges them."""
    num_requests = batch.num_decodes
    num_kv_heads = k_cache.shape[1]
    block_group = next_power_of_2(q.shape[1] // num_kv_heads)
    num_groups = shared.prefix_lens.shape[0]
    # Enough for a few large groups; with many small ones a program takes several tiles.
    num_programs = cdiv(num_requests * block_group, config.block_m) + 7
    settings = launch_settings(q, k_cache, v_cache, rotated, window, is_chunked, softcap, config)
    _prefix_kernel[(num_kv_heads, num_splits, num_programs)](
        q,
        None if rotated is None else rotated.q,
        k_cache,
        None if rotated is None else rotated.k,
        None if v_cache is k_cache else v_cache,
        batch.seq_lens,
        batch.rows,
        batch.slot_table,
        batch.slot_map,
        slopes,
        shared.prefix_lens,
        shared.cu_members,
        shared.members,
        partial,
        partial_lse,
        num_requests,
        num_groups,
        first_partial,
        batch.slot_table.stride(0),
        window,
        scale * LOG2_E,
        **settings,
        BLOCK_GROUPS=block_requests(num_groups),
        BLOCK_M=max(config.block_m, block_group),
    )


@fast_launch
@attention_kernel
def _decode_kernel(
    q,
    q_rope,
    k_cache,
    k_rope,
    v_cache,
    out,
    seq_lens,
    rows,
    slot_table,
    slot_map,
    sinks,
    slopes,
    own_starts,
    positions,
    cos_sin,
    q_norm,
    k_norm,
    eps,
    partial,
    partial_lse,
    arrivals,
    num_requests,
    num_splits,
    table_stride,
    window,
    is_beside,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    CACHE_MAX: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PREFIX_BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    HAS_PREFETCH: tl.constexpr,
    IS_MERGED_LATER: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)

    # Tiles in order of request, KV head, token. Padding has none.
    i = tl.arange(0, BLOCK_B)
    is_request = i < num_requests
    lens = tl.load(seq_lens + i, mask=is_request, other=0)
    firsts = tl.zeros_like(lens)
    if own_starts is not None:
        firsts = tl.load(own_starts + i, mask=is_request, other=0)
    if HAS_WINDOW:
        firsts = tl.maximum(firsts, first_seen(lens - 1, window, HAS_WINDOW))
    ends = tl.cumsum((lens - firsts + BLOCK_N - 1) // BLOCK_N, axis=0) * NUM_KV_HEADS
    total = tl.max(ends, axis=0)
    share = total // num_programs
    rest = total % num_programs  # as many programs have one tile more
    begin = program * share + tl.minimum(program, rest)
    end = begin + share + (program < rest).to(tl.int32)
    if PDL:  # noqa: SIM102 - known to the compiler, as below
        if total == 0:  # in a graph all may be padding, for which nobody would wait
            tl.extra.cuda.gdc_wait()

    m_rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_dim = d < HEAD_DIM
    partner = _partner(d, HALF)
    v_columns = tl.arange(0, BLOCK_V)
    g = tl.arange(0, BLOCK_GROUP)
    work = begin
    while work < end:
        request, request_begin = find(ends, work)
        seq_len = tl.load(seq_lens + request)
        first = seq_len * 0
        prefix_len = seq_len * 0
        if own_starts is not None:
            prefix_len = tl.load(own_starts + request)
            first = prefix_len
        if HAS_WINDOW:
            first = tl.maximum(first, first_seen(seq_len - 1, window, HAS_WINDOW))
        num_tiles = (seq_len - first + BLOCK_N - 1) // BLOCK_N
        kv_head = (work - request_begin) // num_tiles
        row_begin = request_begin + kv_head * num_tiles
        tile = work - row_begin
        num_taken = tl.minimum(num_tiles - tile, end - work)

        tile_first = first + tile * BLOCK_N
        slots = slot_table + tl.load(rows + request).to(tl.int64) * table_stride
        slot = load_slots(slots, slot_map, tile_first, tile_first, seq_len, BLOCK_N)
        if HAS_PREFETCH and work == begin:
            prefetch_to_l2(k_cache + kv_head * K_HEAD_STRIDE + slot.to(tl.int64) * K_STRIDE, HEAD_DIM)
            if v_cache is not None:
                prefetch_to_l2(v_cache + kv_head * V_HEAD_STRIDE + slot.to(tl.int64) * V_STRIDE, V_DIM)
        if cos_sin is not None:
            cos, sin = _load_rotation(cos_sin, tl.load(positions + request).to(tl.int64), HALF, BLOCK_D)
        if PDL:  # noqa: SIM102 - known to the compiler, which must not see more where it does not hold
            if is_beside == 0:
                tl.extra.cuda.gdc_wait()  # for the queries and the newest key and value; all else was there before

        is_element = (m_rows < GROUP)[:, None] & (v_columns < V_DIM)[None, :]
        is_head = m_rows < GROUP
        token = request.to(tl.int64)
        head = kv_head * GROUP + m_rows
        q_row = token * Q_STRIDE + head * Q_HEAD_STRIDE
        row_last = tl.zeros([BLOCK_M], tl.int32) + seq_len - 1
        if cos_sin is None:
            q_tile = tl.load(q + q_row[:, None] + d[None, :], mask=is_head[:, None] & is_dim[None, :], other=0.0)
        else:
            k_row = q + token * Q_STRIDE + (NUM_KV_HEADS * GROUP + kv_head) * HEAD_DIM
            k_new = tl.load(k_row + d[None, :], mask=is_dim[None, :], other=0.0)
            k_partner = tl.load(k_row + partner[None, :], mask=is_dim[None, :], other=0.0)
            v_new = tl.load(k_row + NUM_KV_HEADS * HEAD_DIM + d, mask=is_dim, other=0.0)
            q_tile = tl.load(q + q_row[:, None] + d[None, :], mask=is_head[:, None] & is_dim[None, :], other=0.0)
            q_partner = tl.load(
                q + q_row[:, None] + partner[None, :], mask=is_head[:, None] & is_dim[None, :], other=0.0
            )
            if tile + num_taken == num_tiles:
                k_new = _rotate(k_new, k_partner, k_norm, cos, sin, eps, HEAD_DIM, HALF, BLOCK_D)
                new_slot = load_slots(slots, slot_map, seq_len - 1, seq_len - 1, seq_len, 1).to(tl.int64)[:, None]
                k_new_pointers = k_cache + kv_head * K_HEAD_STRIDE + new_slot * K_STRIDE + d[None, :]
                v_new_pointers = v_cache + kv_head * V_HEAD_STRIDE + new_slot * V_STRIDE + d[None, :]
                store_in_cache(k_new_pointers, k_new, is_dim[None, :], CACHE_MAX)
                store_in_cache(v_new_pointers, v_new[None, :], is_dim[None, :], CACHE_MAX)
            q_tile = _rotate(q_tile, q_partner, q_norm, cos, sin, eps, HEAD_DIM, HALF, BLOCK_D)
            tl.debug_barrier()  # all threads' parts of the new key and value are written before they are read
        m, l, acc = attend(
            q_tile,
            None
            if q_rope is None
            else load_rotated(q_rope, token, head, is_head, ROPE_DIM, BLOCK_ROPE, Q_ROPE_STRIDE, Q_ROPE_HEAD_STRIDE),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_V], tl.float32),
            k_cache + kv_head * K_HEAD_STRIDE,
            k_rope,
            None if v_cache is None else v_cache + kv_head * V_HEAD_STRIDE,
            slots,
            slot_map,
            slot,
            tile_first,
            tl.minimum(tile_first + num_taken * BLOCK_N, seq_len),
            seq_len,
            row_last,
            row_last,
            None if slopes is None else load_slopes(slopes, kv_head * GROUP + m_rows, m_rows < GROUP),
            qk_scale,
            K_STRIDE,
            K_ROPE_STRIDE,
            V_STRIDE,
            HEAD_DIM,
            ROPE_DIM,
            V_DIM,
            True,
            False,
            SOFTCAP,
            True,
            BLOCK_N,
            BLOCK_D,
            BLOCK_ROPE,
            BLOCK_V,
            PRECISION,
        )
        l = tl.sum(l, axis=1)
        result = acc / l[:, None]
        out_row = request.to(tl.int64) * OUT_STRIDE + kv_head * GROUP * V_DIM
        if (num_taken == num_tiles) & (prefix_len == 0):
            out_pointers = out + out_row + m_rows[:, None] * V_DIM + v_columns[None, :]
            if sinks is not None:
                of_tokens = share_beside_sink(m + tl.log2(l), sinks, kv_head * GROUP + m_rows, m_rows < GROUP)
                result *= of_tokens[:, None]
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=is_element)
        else:
            index = 2 * program + (work != begin).to(tl.int32)
            pointers = partial + (index * BLOCK_GROUP + m_rows[:, None]) * V_DIM + v_columns[None, :]
            tl.store(pointers, result, mask=is_element)
            tl.store(partial_lse + index * BLOCK_GROUP + m_rows, m + tl.log2(l), mask=m_rows < GROUP)

            if not IS_MERGED_LATER:
                first_program = _program_of(row_begin, share, rest)
                num_own = _program_of(row_begin + num_tiles - 1, share, rest) - first_program + 1
                tl.debug_barrier()  # all threads' parts of the partial result are written before its arrival counts
                arrival = arrivals + request * NUM_KV_HEADS + kv_head
                if tl.atomic_add(arrival, 1, sem="acq_rel") == num_own - 1:
                    tl.store(arrival, 0)
                    first_begin = first_program * share + tl.minimum(first_program, rest)
                    prefix_first = 2 * num_programs + request * NUM_KV_HEADS + kv_head
                    num_prefix = 0
                    if own_starts is not None:
                        num_prefix = tl.cdiv(prefix_len, part_len(prefix_len, num_splits, PREFIX_BLOCK_N))
                    merged, lse = _merge(
                        partial,
                        partial_lse,
                        2 * first_program + (row_begin != first_begin).to(tl.int32),
                        2 * first_program,
                        num_own,
                        prefix_first,
                        num_requests * NUM_KV_HEADS,
                        num_prefix,
                        GROUP,
                        V_DIM,
                        BLOCK_P,
                        BLOCK_GROUP,
                        BLOCK_V,
                    )
                    merged_pointers = out + out_row + g[:, None] * V_DIM + v_columns[None, :]
                    mask = (g < GROUP)[:, None] & (v_columns < V_DIM)[None, :]
                    if sinks is not None:
                        merged *= share_beside_sink(lse, sinks, kv_head * GROUP + g, g < GROUP)[:, None]
                    tl.store(merged_pointers, merged.to(out.dtype.element_ty), mask=mask)
        work += num_taken
    if PDL:  # noqa: SIM102
        if is_beside != 0:
            tl.extra.cuda.gdc_wait()  # so that who waits for this kernel has waited for the one ahead


@triton.jit
def _load_rotation(cos_sin, position, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return what elements of a head and their partners are multiplied by at `position`, [BLOCK_D] each."""
    d = tl.arange(0, BLOCK_D)
    angle = cos_sin + position * 2 * HALF + tl.where(d < HALF, d, d - HALF)
    cos = tl.load(angle, mask=d < 2 * HALF, other=1.0)
    sin = tl.load(angle + HALF, mask=d < 2 * HALF, other=0.0)
    return cos, tl.where(d < HALF, -sin, sin)


@triton.jit
def _partner(d, HALF: tl.constexpr):
    """Return the element of a head that each one rotates with; itself where it is not rotated."""
    return tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))


@triton.jit
def _rotate(x, partner, norm, cos, sin, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """Norm and rotate heads x [M, BLOCK_D] as `rope_and_store` does; `partner`: the elements they rotate with."""
    if norm is not None:
        d = tl.arange(0, BLOCK_D)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
        x = _scaled(x, scale, tl.load(norm + d, mask=d < HEAD_DIM, other=0.0)[None, :])
        partner = _scaled(partner, scale, tl.load(norm + _partner(d, HALF), mask=d < HEAD_DIM, other=0.0)[None, :])
    return (x * cos[None, :] + partner * sin[None, :]).to(x.dtype)


@triton.jit
def _scaled(x, scale, weight):
    return ((x.to(tl.float32) * scale).to(weight.dtype) * weight).to(x.dtype)


@triton.jit
def _program_of(tile, share, rest):
    """Return the program that has `tile`, where the first `rest` programs have share + 1 each and the others share."""
    split = rest * (share + 1)
    return tl.where(tile < split, tile // (share + 1), rest + (tile - split) // tl.maximum(share, 1))


@triton.jit
def _merge(
    partial,
    partial_lse,
    first_own,
    base_own,
    num_own,
    base_prefix,
    prefix_stride,
    num_prefix,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Merge the results of `num_own` programs and `num_prefix` parts of a prefix.

    Returns them, [BLOCK_GROUP, BLOCK_V], and their log-sum-exps, [BLOCK_GROUP]. Loads bypass the L1
    cache, which may hold older values.
    """
    p = tl.arange(0, BLOCK_P)
    g = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_V)
    m = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_V], tl.float32)
    for start in range(0, num_own + num_prefix, BLOCK_P):
        piece = start + p
        own = tl.where(piece == 0, first_own, base_own + 2 * piece)
        index = tl.where(piece < num_own, own, base_prefix + (piece - num_own) * prefix_stride).to(tl.int64)
        row = index[:, None] * BLOCK_GROUP + g[None, :]
        is_row = (piece < num_own + num_prefix)[:, None] & (g < GROUP)[None, :]
        lse = tl.load(partial_lse + row, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        pointers = partial + row[:, :, None] * V_DIM + d[None, None, :]
        mask = is_row[:, :, None] & (d < V_DIM)[None, None, :]
        values = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(tl.maximum(m, tl.max(lse, axis=0)), -1e30)  # rows of padding have seen nothing
        weights = tl.exp2(lse - new_m[None, :])
        alpha = tl.exp2(m - new_m)
        l = l * alpha + tl.sum(weights, axis=0)
        acc = acc * alpha[:, None] + tl.sum(values * weights[:, :, None], axis=0)
        m = new_m
    return acc / l[:, None], m + tl.log2(l)


@fast_launch
@attention_kernel
def _merge_kernel(
    out,
    seq_lens,
    partial,
    partial_lse,
    num_requests,
    num_programs,
    OUT_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge some columns of what programs of `_decode_kernel` found for a head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    request = tl.program_id(0) // (NUM_KV_HEADS * GROUP)
    head = tl.program_id(0) % (NUM_KV_HEADS * GROUP)
    kv_head = head // GROUP
    i = tl.arange(0, BLOCK_B)
    is_request = i < num_requests
    lens = tl.load(seq_lens + i, mask=is_request, other=0)
    all_tiles = (lens + BLOCK_N - 1) // BLOCK_N * NUM_KV_HEADS
    num_tiles = tl.sum(tl.where(i == request, all_tiles, 0), axis=0) // NUM_KV_HEADS
    total = tl.sum(all_tiles, axis=0)
    row_begin = tl.sum(tl.where(i < request, all_tiles, 0), axis=0) + kv_head * num_tiles
    share = total // num_programs
    rest = total % num_programs
    first_program = _program_of(row_begin, share, rest)
    num_own = _program_of(row_begin + num_tiles - 1, share, rest) - first_program + 1
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (num_tiles > 0) & (num_own > 1):  # else its program wrote the result
        first_begin = first_program * share + tl.minimum(first_program, rest)
        first_own = 2 * first_program + (row_begin != first_begin).to(tl.int32)
        p = tl.arange(0, BLOCK_P)
        v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        m = float("-inf")
        l = 0.0
        acc = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, num_own, BLOCK_P):
            piece = start + p
            own = tl.where(piece == 0, first_own, 2 * (first_program + piece))
            row = own.to(tl.int64) * BLOCK_GROUP + head % GROUP
            is_piece = piece < num_own
            lse = tl.load(partial_lse + row, mask=is_piece, other=float("-inf"))
            mask = is_piece[:, None] & (v < V_DIM)[None, :]
            values = tl.load(partial + row[:, None] * V_DIM + v[None, :], mask=mask, other=0.0)
            new_m = tl.maximum(m, tl.max(lse, axis=0))
            weights = tl.exp2(lse - new_m)
            alpha = tl.exp2(m - new_m)
            l = l * alpha + tl.sum(weights, axis=0)
            acc = acc * alpha + tl.sum(values * weights[:, None], axis=0)
            m = new_m
        to = out + request.to(tl.int64) * OUT_STRIDE + head * V_DIM + v
        tl.store(to, (acc / l).to(out.dtype.element_ty), mask=v < V_DIM)


@fast_launch
@attention_kernel
def _prefix_kernel(
    q,
    q_rope,
    k_cache,
    k_rope,
    v_cache,
    seq_lens,
    rows,
    slot_table,
    slot_map,
    slopes,
    prefix_lens,
    cu_members,
    members,
    partial,
    partial_lse,
    num_requests,
    num_groups,
    first_partial,
    table_stride,
    window,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
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
    BLOCK_GROUPS: tl.constexpr,
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
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    BLOCK_MEMBERS: tl.constexpr = BLOCK_M // BLOCK_GROUP
    i = tl.arange(0, BLOCK_GROUPS)
    is_group = i < num_groups
    sizes = tl.load(cu_members + i + 1, mask=is_group, other=0) - tl.load(cu_members + i, mask=is_group, other=0)
    sizes = tl.where(tl.load(prefix_lens + i, mask=is_group, other=0) > 0, sizes, 0)
    ends = tl.cumsum((sizes + BLOCK_MEMBERS - 1) // BLOCK_MEMBERS, axis=0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    m_rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    v_columns = tl.arange(0, BLOCK_V)
    for tile in range(tl.program_id(2), tl.max(ends, axis=0), tl.num_programs(2)):
        group, group_begin = find(ends, tile)
        prefix_len = tl.load(prefix_lens + group)
        split_len = part_len(prefix_len, num_splits, BLOCK_N)
        first = split * split_len
        last = tl.minimum(first + split_len, prefix_len)
        if first < last:
            first_member = tl.load(cu_members + group)
            member = first_member + (tile - group_begin) * BLOCK_MEMBERS + m_rows // BLOCK_GROUP
            is_row = (member < tl.load(cu_members + group + 1)) & (m_rows % BLOCK_GROUP < GROUP)
            request = tl.load(members + member, mask=is_row, other=0)
            head = kv_head * GROUP + m_rows % BLOCK_GROUP
            is_element = is_row[:, None] & (v_columns < V_DIM)[None, :]
            token = request.to(tl.int64)
            q_row = token * Q_STRIDE + head * Q_HEAD_STRIDE
            q_tile = tl.load(q + q_row[:, None] + d[None, :], mask=is_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
            row_last = tl.zeros([BLOCK_M], tl.int32) + last - 1
            row_first = row_last
            if HAS_WINDOW:
                position = tl.load(seq_lens + request, mask=is_row, other=1) - 1
                row_first = first_seen(position, window, HAS_WINDOW)
            slots = slot_table + tl.load(rows + tl.load(members + first_member)).to(tl.int64) * table_stride
            whole = last // BLOCK_N * BLOCK_N  # `first` is a whole number of tiles
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
                last,
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
            if HAS_WINDOW:
                l = tl.where(l > 0, l, 1.0)  # a member whose window is past this part: its m is -1e30
            index = first_partial + (split * num_requests + request.to(tl.int64)) * NUM_KV_HEADS + kv_head
            row = index * BLOCK_GROUP + m_rows % BLOCK_GROUP
            tl.store(partial + row[:, None] * V_DIM + v_columns[None, :], acc / l[:, None], mask=is_element)
            lse = m + tl.log2(l)
            if slopes is not None:  # scores were as seen from the end of this part, not from the query
                position = tl.load(seq_lens + request, mask=is_row, other=1) - 1
                lse -= load_slopes(slopes, head, is_row) * (position - row_last).to(tl.float32)
            tl.store(partial_lse + row, lse, mask=is_row)

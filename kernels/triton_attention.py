"""Attention over the paged KV cache in Triton: decoding, decoding with shared prefixes, and prompts.

The query heads of one KV head are rows of one tile (GQA packed in M), so keys and values are read once for all of them.
Scores are kept in units of log2, for exp2. The definition is `kernels.attention.attention_torch`.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.attention import AttentionBatch, SharedPrefixes
from kernels.launch import cdiv, fast_launch, next_power_of_2, num_sms
from kernels.triton_elementwise import launch_options

LOG2_E = 1.4426950408889634
MIN_DOT_ROWS = 16


class DecodeConfig(NamedTuple):
    block_n: int  # tokens a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int
    has_prefetch: bool = False  # bring a program's first tile to the L2 cache before the kernel ahead has ended


class PrefillConfig(NamedTuple):
    block_m: int  # queries x heads of a KV head
    block_n: int
    num_warps: int
    num_stages: int


# By (head_dim rounded up to a power of two, largest number of requests it is for): the fastest of bench/attention.py.
DECODE_CONFIGS: dict[tuple[int, int], DecodeConfig] = {
    (128, 4): DecodeConfig(block_n=64, num_warps=4, num_stages=3, programs_per_sm=1, has_prefetch=True),
    (128, 16): DecodeConfig(block_n=32, num_warps=1, num_stages=4, programs_per_sm=2),
    (128, 1 << 20): DecodeConfig(block_n=32, num_warps=1, num_stages=4, programs_per_sm=4),
}
PREFIX_CONFIGS: dict[int, PrefillConfig] = {128: PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=3)}
PREFILL_CONFIGS: dict[int, PrefillConfig] = {128: PrefillConfig(block_m=64, block_n=64, num_warps=4, num_stages=3)}
PREFILL_PROGRAMS_PER_SM = 2
MAX_PREFILL_SPLITS = 8
MAX_SPLIT_PROMPTS = 16  # more of them fill the chip
MIN_SPLIT_LEN = 512  # tokens of context that are worth a program of their own, if there are places for more of them
MIN_WAVE_SPLIT_LEN = 4096  # likewise, if there are none
MAX_SPLIT_WAVES = 4  # of programs on the device, above which a last one that is hardly filled costs little
SAME_WAVES = 1.08  # so little more waves are not worth more parts, which have to be merged


def decode_config(block_d: int, num_requests: int, itemsize: int) -> DecodeConfig:
    """itemsize: bytes of an element of q."""
    if itemsize == 4:
        return DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs_per_sm=2)
    fitting = [key for key in DECODE_CONFIGS if key[0] == block_d and num_requests <= key[1]]
    if fitting:
        return DECODE_CONFIGS[min(fitting)]
    return DecodeConfig(block_n=64 if block_d <= 128 else 32, num_warps=4, num_stages=3, programs_per_sm=2)


def prefill_config(configs: dict[int, PrefillConfig], block_d: int, itemsize: int) -> PrefillConfig:
    """An entry of PREFILL_CONFIGS or PREFIX_CONFIGS, or what surely fits. itemsize: bytes of an element of q."""
    if itemsize == 4:
        return PrefillConfig(block_m=32, block_n=16, num_warps=4, num_stages=1)
    default = PrefillConfig(block_m=64, block_n=64 if block_d <= 128 else 32, num_warps=4, num_stages=2)
    return configs.get(block_d, default)


def attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
) -> torch.Tensor:
    """As `kernels.attention.attention`. On one device it must not run on two streams at once."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_decodes = batch.num_decodes
    if num_decodes:
        decode(q, k_cache, v_cache, batch, out, scale=scale, window=window, softcap=softcap)
    if num_decodes < len(batch.rows):
        prefill(q, k_cache, v_cache, batch, out, scale=scale, window=window, softcap=softcap)
    return out


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
    prefix_config: PrefillConfig | None = None,
    num_prefix_splits: int | None = None,
) -> None:
    """The first num_decodes tokens of the batch, into `out`, which stays as it is where the length is 0: padding.

    Every program takes an equal run of the tiles of all requests and heads ("stream-K", Osama et al. 2023), so that
    any mix of lengths fills the chip. Where a run starts or ends inside a request, the program leaves a partial
    result, and the last to arrive at a request merges them: no second kernel, and none of this for whole requests.
    On Hopper lengths and slots are read before the kernel ahead has ended, which must not be the one to write them.
    """
    num_requests = batch.num_decodes
    head_dim, num_kv_heads = q.shape[2], k_cache.shape[1]
    block_group = next_power_of_2(q.shape[1] // num_kv_heads)
    block_d = next_power_of_2(head_dim)
    config = config or decode_config(block_d, num_requests, q.dtype.itemsize)
    num_programs = num_programs or config.programs_per_sm * num_sms(q.device)
    shared = batch.shared
    num_splits = 0
    if shared is not None:
        prefix_config = prefix_config or prefill_config(PREFIX_CONFIGS, block_d, q.dtype.itemsize)
        num_tiles = cdiv(num_requests * block_group, prefix_config.block_m)
        num_splits = num_prefix_splits or max(1, min(16, 2 * num_sms(q.device) // (num_tiles * num_kv_heads)))
    # A program leaves at most two partial results: of the request it starts in and of the one it ends in.
    num_partials = 2 * num_programs + num_splits * num_requests * num_kv_heads
    partial = torch.empty(num_partials, block_group, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(num_partials, block_group, dtype=torch.float32, device=q.device)
    if shared is not None:
        assert prefix_config is not None
        _prefix_partials(
            q, k_cache, v_cache, batch, shared, partial, partial_lse, 2 * num_programs, num_splits, scale, window,
            softcap, prefix_config,
        )  # fmt: skip
    # Few requests are cut into many parts, whose merging is part of the latency; many requests need the registers
    # for more programs on an SM.
    merge_registers = 64 if num_requests <= 4 else 32
    options = _options(q, k_cache, v_cache, window, softcap, config)
    _decode_kernel[(num_programs,)](
        q,
        k_cache,
        v_cache,
        out,
        batch.seq_lens,
        batch.rows,
        batch.slot_table,
        shared.own_starts if shared is not None else None,
        partial,
        partial_lse,
        _arrival_counters(q.device, num_requests * num_kv_heads),
        num_requests,
        num_splits,
        batch.slot_table.stride(0),
        window,
        scale * LOG2_E,
        **options,
        BLOCK_B=_block_requests(num_requests),
        BLOCK_M=max(MIN_DOT_ROWS, block_group),
        BLOCK_P=max(1, merge_registers * 32 * config.num_warps // (block_group * block_d)),
        PREFIX_BLOCK_N=prefix_config.block_n if prefix_config is not None else 1,
        HAS_PREFETCH=options["PDL"] and config.has_prefetch,
    )


def _prefix_partials(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    shared: SharedPrefixes,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    first_partial: int,
    num_splits: int,
    scale: float,
    window: int,
    softcap: float,
    config: PrefillConfig,
) -> None:
    """Attention of each group's members to its prefix, in `num_splits` parts: what `decode` merges with their own."""
    num_requests = batch.num_decodes
    num_kv_heads = k_cache.shape[1]
    block_group = next_power_of_2(q.shape[1] // num_kv_heads)
    num_groups = shared.prefix_lens.shape[0]
    # Enough for a few large groups; with many small ones a program takes several tiles.
    num_programs = cdiv(num_requests * block_group, config.block_m) + 7
    options = _options(q, k_cache, v_cache, window, softcap, config)
    _prefix_kernel[(num_kv_heads, num_splits, num_programs)](
        q,
        k_cache,
        v_cache,
        batch.seq_lens,
        batch.rows,
        batch.slot_table,
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
        **options,
        BLOCK_GROUPS=_block_requests(num_groups),
        BLOCK_M=max(config.block_m, block_group),
    )


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    softcap: float = 0.0,
    config: PrefillConfig | None = None,
    num_splits: int | None = None,
    min_split_len: int = MIN_SPLIT_LEN,
) -> None:
    """The tokens after the first num_decodes, whatever number of them a request has, into `out`.

    Where they do not fill the chip, or fill it a last time badly, their context is cut into up to `num_splits` parts;
    the last program to have attended to its part merges them. How many there are depends on the context, which only the
    device knows in a captured graph.
    """
    num_requests = len(batch.rows) - batch.num_decodes
    num_kv_heads = k_cache.shape[1]
    block_group = next_power_of_2(q.shape[1] // num_kv_heads)
    config = config or prefill_config(PREFILL_CONFIGS, next_power_of_2(q.shape[2]), q.dtype.itemsize)
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
        partial = torch.empty(num_rows, q.shape[2], dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(num_rows, dtype=torch.float32, device=q.device)
        arrivals = _arrival_counters(q.device, num_programs)
    options = _options(q, k_cache, v_cache, window, softcap, config)
    _prefill_kernel[(num_programs, num_splits)](
        q,
        k_cache,
        v_cache,
        out,
        batch.seq_lens[batch.num_decodes :],
        batch.cu_q_lens[batch.num_decodes :],
        batch.rows[batch.num_decodes :],
        batch.slot_table,
        partial,
        partial_lse,
        arrivals,
        num_requests,
        batch.slot_table.stride(0),
        window,
        min_split_len,
        scale * LOG2_E,
        **options,
        BLOCK_B=_block_requests(num_requests),
        BLOCK_M=block_m,
    )


def prefill_splits(num_programs: int, num_places: int) -> tuple[int, int]:
    """(parts that a prompt's context is cut into at most, tokens of context that are worth a part).

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


def _options(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    window: int,
    softcap: float,
    config: DecodeConfig | PrefillConfig,
) -> dict[str, Any]:
    """What all three kernels are compiled for and launched with."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    return {
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": k_cache.stride(0),
        "V_STRIDE": v_cache.stride(0),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HAS_WINDOW": window >= 0,
        "SOFTCAP": softcap * LOG2_E,
        "BLOCK_GROUP": next_power_of_2(group),
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_stages": config.num_stages,
        **launch_options(q.device, config.num_warps),
    }


@functools.cache
def _counters(device: torch.device, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def _arrival_counters(device: torch.device, size: int) -> torch.Tensor:
    """Zeros, and zeros again when a kernel is done with them. The first call must not be inside a graph's capture."""
    return _counters(device, max(16384, next_power_of_2(size)))


def _block_requests(num_requests: int) -> int:
    """A power of two that holds them; few different ones, since each compiles its own kernel."""
    return next((block for block in (16, 256) if num_requests <= block), max(1024, next_power_of_2(num_requests)))


# Views of a step's staging buffer start anywhere and counts vary: none of it is worth compiling a kernel again.
_kernel = triton.jit(
    do_not_specialize=[
        "num_requests", "num_splits", "num_groups", "first_partial", "table_stride", "window", "min_split_len",
    ],
    do_not_specialize_on_alignment=[
        "seq_lens", "rows", "cu_q_lens", "own_starts", "prefix_lens", "cu_members", "members",
    ],
)  # fmt: skip


@triton.jit
def _load_slots(slots, first, seq_len, BLOCK_N: tl.constexpr):
    """Of tokens first, first + 1, ...; past the end the last one's: some slot must be read, and this one is finite."""
    return tl.load(slots + tl.minimum(first + tl.arange(0, BLOCK_N), seq_len - 1))


@triton.jit
def _prefetch(pointers, N: tl.constexpr):
    """Start to bring the N elements at each pointer to the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers, tl.full([1], N * pointers.dtype.element_ty.primitive_bitwidth // 8, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _attend(
    q,
    m,
    l,
    acc,
    k_cache,
    v_cache,
    slots,
    slot,
    first,
    last,
    seq_len,
    row_first,
    row_last,
    qk_scale,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAZY_SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add tokens [first, last) of a sequence to the running softmax (m, l, acc) of q [M, D].

    k_cache and v_cache point at the KV head, `slots` at the sequence's line of the slot table; `slot` [BLOCK_N] is
    what stands there at `first`: the pipeliner would spend its stages on slots and leave few to keys and values, so
    they are loaded a tile ahead by hand. Row r sees tokens row_first[r] to row_last[r], which are looked at if
    IS_MASKED (and HAS_WINDOW, for row_first). With LAZY_SUM l is [M, BLOCK_N], summed by the caller: a sum over
    columns that several warps hold costs two barriers.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        token = start + n
        next_slot = _load_slots(slots, start + BLOCK_N, seq_len, BLOCK_N)
        offset = slot.to(tl.int64)[:, None]
        if HEAD_DIM == BLOCK_D:
            k = tl.load(k_cache + offset * K_STRIDE + d[None, :])
        else:
            k = tl.load(k_cache + offset * K_STRIDE + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SOFTCAP > 0:
            # tanh(x) = 2 sigmoid(2 x) - 1; SOFTCAP and qk_scale are both in units of log2.
            scores = SOFTCAP * (2 * tl.sigmoid(scores * (2 * qk_scale / SOFTCAP)) - 1)
            scale = 1.0
        else:
            scale = qk_scale
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
        acc = acc * alpha[:, None]
        if HEAD_DIM == BLOCK_D:
            v = tl.load(v_cache + offset * V_STRIDE + d[None, :])
        else:
            v = tl.load(v_cache + offset * V_STRIDE + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        m = new_m
        slot = next_slot
    return m, l, acc


@triton.jit
def _attend_prompt(
    q,
    k_cache,
    v_cache,
    slots,
    first,
    whole,
    last,
    seq_len,
    row_first,
    row_last,
    qk_scale,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(m, l, acc) of q over tokens [first, last), of which all rows see those before `whole` if there is no window."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    masked = first
    if not HAS_WINDOW:
        masked = whole
        slot = _load_slots(slots, first, seq_len, BLOCK_N)
        m, l, acc = _attend(
            q, m, l, acc, k_cache, v_cache, slots, slot, first, whole, seq_len, row_first, row_last, qk_scale,
            K_STRIDE, V_STRIDE, HEAD_DIM, False, False, SOFTCAP, False, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    slot = _load_slots(slots, masked, seq_len, BLOCK_N)
    return _attend(
        q, m, l, acc, k_cache, v_cache, slots, slot, masked, last, seq_len, row_first, row_last, qk_scale,
        K_STRIDE, V_STRIDE, HEAD_DIM, True, HAS_WINDOW, SOFTCAP, False, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip


@triton.jit
def _find(ends, work):
    """(index, where it starts) of the entry whose run of work, ended by `ends` [N] (ascending), holds `work`."""
    is_before = ends <= work
    return tl.sum(is_before.to(tl.int32), axis=0), tl.max(tl.where(is_before, ends, 0), axis=0)


@fast_launch
@_kernel
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    seq_lens,
    rows,
    slot_table,
    own_starts,
    partial,
    partial_lse,
    arrivals,
    num_requests,
    num_splits,
    table_stride,
    window,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PREFIX_BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    HAS_PREFETCH: tl.constexpr,
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
        firsts = tl.maximum(firsts, lens - window)
    ends = tl.cumsum((lens - firsts + BLOCK_N - 1) // BLOCK_N, axis=0) * NUM_KV_HEADS
    total = tl.max(ends, axis=0)
    share = total // num_programs
    rest = total % num_programs  # as many programs have one tile more
    begin = program * share + tl.minimum(program, rest)
    end = begin + share + (program < rest).to(tl.int32)

    m_rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_GROUP)
    work = begin
    while work < end:
        request, request_begin = _find(ends, work)
        seq_len = tl.load(seq_lens + request)
        first = seq_len * 0
        prefix_len = seq_len * 0
        if own_starts is not None:
            prefix_len = tl.load(own_starts + request)
            first = prefix_len
        if HAS_WINDOW:
            first = tl.maximum(first, seq_len - window)
        num_tiles = (seq_len - first + BLOCK_N - 1) // BLOCK_N
        kv_head = (work - request_begin) // num_tiles
        row_begin = request_begin + kv_head * num_tiles
        tile = work - row_begin
        num_taken = tl.minimum(num_tiles - tile, end - work)

        tile_first = first + tile * BLOCK_N
        slots = slot_table + tl.load(rows + request).to(tl.int64) * table_stride
        slot = _load_slots(slots, tile_first, seq_len, BLOCK_N)
        if HAS_PREFETCH and work == begin:
            _prefetch(k_cache + kv_head * HEAD_DIM + slot.to(tl.int64) * K_STRIDE, HEAD_DIM)
            _prefetch(v_cache + kv_head * HEAD_DIM + slot.to(tl.int64) * V_STRIDE, HEAD_DIM)
        if PDL:
            tl.extra.cuda.gdc_wait()  # for the queries and the newest key and value; all else was there before

        is_element = (m_rows < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q_row = request.to(tl.int64) * Q_STRIDE + (kv_head * GROUP + m_rows) * HEAD_DIM
        row_last = tl.zeros([BLOCK_M], tl.int32) + seq_len - 1
        m, l, acc = _attend(
            tl.load(q + q_row[:, None] + d[None, :], mask=is_element, other=0.0),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
            k_cache + kv_head * HEAD_DIM,
            v_cache + kv_head * HEAD_DIM,
            slots,
            slot,
            tile_first,
            tl.minimum(tile_first + num_taken * BLOCK_N, seq_len),
            seq_len,
            row_last,
            row_last,
            qk_scale,
            K_STRIDE,
            V_STRIDE,
            HEAD_DIM,
            True,
            False,
            SOFTCAP,
            True,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
        l = tl.sum(l, axis=1)
        result = acc / l[:, None]
        out_row = (request.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP * HEAD_DIM
        if (num_taken == num_tiles) & (prefix_len == 0):
            out_pointers = out + out_row + m_rows[:, None] * HEAD_DIM + d[None, :]
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=is_element)
        else:
            index = 2 * program + (work != begin).to(tl.int32)
            pointers = partial + (index * BLOCK_GROUP + m_rows[:, None]) * HEAD_DIM + d[None, :]
            tl.store(pointers, result, mask=is_element)
            tl.store(partial_lse + index * BLOCK_GROUP + m_rows, m + tl.log2(l), mask=m_rows < GROUP)

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
                    num_prefix = tl.cdiv(prefix_len, _split_len(prefix_len, num_splits, PREFIX_BLOCK_N))
                merged = _merge(
                    partial,
                    partial_lse,
                    2 * first_program + (row_begin != first_begin).to(tl.int32),
                    2 * first_program,
                    num_own,
                    prefix_first,
                    num_requests * NUM_KV_HEADS,
                    num_prefix,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_P,
                    BLOCK_GROUP,
                    BLOCK_D,
                )
                merged_pointers = out + out_row + g[:, None] * HEAD_DIM + d[None, :]
                mask = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
                tl.store(merged_pointers, merged.to(out.dtype.element_ty), mask=mask)
        work += num_taken


@triton.jit
def _program_of(tile, share, rest):
    """The program that has `tile`, where the first `rest` programs have share + 1 each and the others share."""
    split = rest * (share + 1)
    return tl.where(tile < split, tile // (share + 1), rest + (tile - split) // tl.maximum(share, 1))


@triton.jit
def _split_len(prefix_len, num_splits, BLOCK_N: tl.constexpr):
    """Tokens of a prefix in each of its parts, the last apart: whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(prefix_len, num_splits), BLOCK_N), 1) * BLOCK_N


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
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The results of `num_own` programs and `num_prefix` parts of a prefix, as one: [BLOCK_GROUP, BLOCK_D].

    Loads go past the L1 cache, which may hold what lay there before.
    """
    p = tl.arange(0, BLOCK_P)
    g = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_D)
    m = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32)
    for start in range(0, num_own + num_prefix, BLOCK_P):
        piece = start + p
        own = tl.where(piece == 0, first_own, base_own + 2 * piece)
        index = tl.where(piece < num_own, own, base_prefix + (piece - num_own) * prefix_stride).to(tl.int64)
        row = index[:, None] * BLOCK_GROUP + g[None, :]
        is_row = (piece < num_own + num_prefix)[:, None] & (g < GROUP)[None, :]
        lse = tl.load(partial_lse + row, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        pointers = partial + row[:, :, None] * HEAD_DIM + d[None, None, :]
        mask = is_row[:, :, None] & (d < HEAD_DIM)[None, None, :]
        values = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
        new_m = tl.maximum(tl.maximum(m, tl.max(lse, axis=0)), -1e30)  # rows of padding have seen nothing
        weights = tl.exp2(lse - new_m[None, :])
        alpha = tl.exp2(m - new_m)
        l = l * alpha + tl.sum(weights, axis=0)
        acc = acc * alpha[:, None] + tl.sum(values * weights[:, :, None], axis=0)
        m = new_m
    return acc / l[:, None]


@fast_launch
@_kernel
def _prefix_kernel(
    q,
    k_cache,
    v_cache,
    seq_lens,
    rows,
    slot_table,
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
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    for tile in range(tl.program_id(2), tl.max(ends, axis=0), tl.num_programs(2)):
        group, group_begin = _find(ends, tile)
        prefix_len = tl.load(prefix_lens + group)
        split_len = _split_len(prefix_len, num_splits, BLOCK_N)
        first = split * split_len
        last = tl.minimum(first + split_len, prefix_len)
        if first < last:
            first_member = tl.load(cu_members + group)
            member = first_member + (tile - group_begin) * BLOCK_MEMBERS + m_rows // BLOCK_GROUP
            is_row = (member < tl.load(cu_members + group + 1)) & (m_rows % BLOCK_GROUP < GROUP)
            request = tl.load(members + member, mask=is_row, other=0)
            head = kv_head * GROUP + m_rows % BLOCK_GROUP
            is_element = is_row[:, None] & (d < HEAD_DIM)[None, :]
            q_row = request.to(tl.int64) * Q_STRIDE + head * HEAD_DIM
            q_tile = tl.load(q + q_row[:, None] + d[None, :], mask=is_element, other=0.0)
            row_last = tl.zeros([BLOCK_M], tl.int32) + last - 1
            row_first = row_last
            if HAS_WINDOW:
                row_first = tl.load(seq_lens + request, mask=is_row, other=0) - window
            slots = slot_table + tl.load(rows + tl.load(members + first_member)).to(tl.int64) * table_stride
            whole = last // BLOCK_N * BLOCK_N  # `first` is a whole number of tiles
            m, l, acc = _attend_prompt(
                q_tile,
                k_cache + kv_head * HEAD_DIM,
                v_cache + kv_head * HEAD_DIM,
                slots,
                first,
                whole,
                last,
                last,
                row_first,
                row_last,
                qk_scale,
                K_STRIDE,
                V_STRIDE,
                HEAD_DIM,
                HAS_WINDOW,
                SOFTCAP,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
            )
            if HAS_WINDOW:
                l = tl.where(l > 0, l, 1.0)  # a member whose window is past this part: its m is -1e30
            index = first_partial + (split * num_requests + request.to(tl.int64)) * NUM_KV_HEADS + kv_head
            row = index * BLOCK_GROUP + m_rows % BLOCK_GROUP
            tl.store(partial + row[:, None] * HEAD_DIM + d[None, :], acc / l[:, None], mask=is_element)
            tl.store(partial_lse + row, m + tl.log2(l), mask=is_row)


@fast_launch
@_kernel
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    seq_lens,
    cu_q_lens,
    rows,
    slot_table,
    partial,
    partial_lse,
    arrivals,
    num_requests,
    table_stride,
    window,
    min_split_len,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    request, request_begin = _find(ends, tile)
    q_begin = tl.sum(tl.where(i == request, q_begins, 0), axis=0)
    q_len = tl.sum(tl.where(i == request, q_ends, 0), axis=0) - q_begin
    seq_len = tl.sum(tl.where(i == request, all_lens, 0), axis=0)
    row = tl.sum(tl.where(i == request, all_rows, 0), axis=0)
    first_q = (tile - request_begin) * BLOCK_TOKENS
    first_position = seq_len - q_len + first_q
    last = tl.minimum(first_position + BLOCK_TOKENS, seq_len)
    whole = (first_position + 1) // BLOCK_N * BLOCK_N  # tokens that all rows see
    first = seq_len * 0
    if HAS_WINDOW:
        first = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    split = tl.program_id(1)
    num_splits = first * 0 + 1
    if partial is not None:
        most_splits = tl.minimum(tl.num_programs(1), tl.maximum(whole // min_split_len, 1))
        split_len = _split_len(whole, most_splits, BLOCK_N)
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
        q_index = first_q + m_rows // BLOCK_GROUP
        head = kv_head * GROUP + m_rows % BLOCK_GROUP
        is_row = (q_index < q_len) & (m_rows % BLOCK_GROUP < GROUP)
        is_element = is_row[:, None] & (d < HEAD_DIM)[None, :]
        token = (q_begin + q_index).to(tl.int64)
        q_row = token * Q_STRIDE + head * HEAD_DIM
        q_tile = tl.load(q + q_row[:, None] + d[None, :], mask=is_element, other=0.0)

        row_last = seq_len - q_len + q_index
        row_first = row_last - window + 1
        slots = slot_table + row.to(tl.int64) * table_stride
        m, l, acc = _attend_prompt(
            q_tile,
            k_cache + kv_head * HEAD_DIM,
            v_cache + kv_head * HEAD_DIM,
            slots,
            first,
            whole,
            last,
            seq_len,
            row_first,
            row_last,
            qk_scale,
            K_STRIDE,
            V_STRIDE,
            HEAD_DIM,
            HAS_WINDOW,
            SOFTCAP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            PRECISION,
        )
        result = acc / l[:, None]
        out_row = (token * NUM_KV_HEADS * GROUP + head) * HEAD_DIM
        out_pointers = out + out_row[:, None] + d[None, :]
        if num_splits == 1:
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=is_element)
        elif partial is not None:
            is_column = (d < HEAD_DIM)[None, :]
            first_row = tl.program_id(0) * tl.num_programs(1) * BLOCK_M
            part = first_row + split * BLOCK_M + m_rows
            tl.store(partial + part[:, None] * HEAD_DIM + d[None, :], result, mask=is_column)
            tl.store(partial_lse + part, m + tl.log2(l))
            tl.debug_barrier()  # all threads' parts of the result are written before its arrival counts
            arrival = arrivals + tl.program_id(0)
            if tl.atomic_add(arrival, 1, sem="acq_rel") == num_splits - 1:
                tl.store(arrival, 0)
                m = tl.full([BLOCK_M], float("-inf"), tl.float32)
                l = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                for _ in range(num_splits):
                    part = first_row + m_rows
                    lse = tl.load(partial_lse + part, cache_modifier=".cg")
                    pointers = partial + part[:, None] * HEAD_DIM + d[None, :]
                    values = tl.load(pointers, mask=is_column, other=0.0, cache_modifier=".cg")
                    new_m = tl.maximum(m, lse)
                    weight = tl.exp2(lse - new_m)
                    alpha = tl.exp2(m - new_m)
                    l = l * alpha + weight
                    acc = acc * alpha[:, None] + values * weight[:, None]
                    m = new_m
                    first_row += BLOCK_M
                tl.store(out_pointers, (acc / l[:, None]).to(out.dtype.element_ty), mask=is_element)

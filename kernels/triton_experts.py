"""Kernels of `kernels.experts`.

Few pairs: each reads its expert's weights as a matrix-vector product does; pairs with the same expert find them in the
L2 cache. Of up to 16 tokens those that have chosen an expert are one tile. More pairs are sorted by expert on the
device, and tiles of one expert's pairs share its weights. The grid is that of the worst case, so that a CUDA graph
holds for any choice of experts.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import arrival_counters, cdiv, fast_launch, next_power_of_2
from kernels.triton_elementwise import gated, launch_options
from kernels.triton_quantized import has_e4m3, number_of
from kernels.tuning import Configs

MAX_SINGLE_PAIRS = 64  # pairs whose weights are read one by one, of many experts
# Rows and inputs of a program for one pair, with a gate and without, by code: where arithmetic takes longer than the
# memory does, more rows for each input that is read.
PAIR_BLOCKS = {
    "fp4": ((4, 512), (4, 512)),
    **dict.fromkeys(("int8", "fp8", "castable fp8"), ((8, 256), (32, 256))),
}
OTHER_PAIR_BLOCKS = (2, 1024), (8, 256)
MAX_COMPARED_PAIRS = 2048  # each with each; more are counted by chunks, and placed
# By most pairs: how many of them a program compares with all, so many at once, one load of them behind the other.
COMPARED = {1536: (8, 512), MAX_COMPARED_PAIRS: (4, 2048)}
SORT_BLOCK, MAX_CHUNKS, PLACED_EXPERTS = 1024, 64, 4  # pairs that are looked at together, ..., experts of a program
WHOLE_ROW = 1 << 30  # inputs that share a scale, if all of a row do


class TileConfig(NamedTuple):
    """Sizes into which a product of pairs sorted by expert is cut, in tiles of so many pairs."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By most pairs that an expert has on average: tiles nearly twice as high. Measured on an H200 with 128 experts of 768
# and a hidden size of 2,048.
TILE_HEIGHTS = {8: 16, 24: 32, 96: 64}
HIGHEST_TILE = 128
LOWEST_BLOCK = 16  # of pairs, that a product of tiles takes
DEFAULT_TILES = {
    16: TileConfig(64, 128, 4, 4),
    32: TileConfig(64, 128, 4, 3),
    64: TileConfig(128, 64, 4, 4),
    128: TileConfig(128, 64, 8, 3),
}
WIDE_TILE = TileConfig(32, 16, 8, 1)  # of float32, whose products no tensor core makes: their code is as long as a tile
TILE_CODES = (None, "int4", "fp4", "int8", "fp8", "castable fp8")


def default_tile_config(_num_rows: int, _k: int, code: int, block_m: int) -> TileConfig:
    """Return the configuration of shapes that no table has."""
    if TILE_CODES[code] == "fp4" and block_m == 64:
        return TileConfig(128, 64, 8, 4)  # four warps would take all registers, and have nobody to wait beside them
    return DEFAULT_TILES[block_m]


# By (an expert's rows, K, place of the code in `TILE_CODES`, pairs of a tile).
TILE_CONFIGS = Configs("experts", TileConfig, default_tile_config)


def tile_height(num_pairs: int, num_experts: int) -> int | None:
    """Return how many pairs of an expert a step's tiles have.

    None: pairs are taken one by one, being so few that most have an expert of their own.
    """
    if num_pairs <= min(MAX_SINGLE_PAIRS, num_experts // 2):
        return None
    average = num_pairs / num_experts
    return next((height for most, height in TILE_HEIGHTS.items() if average <= most), HIGHEST_TILE)


class Sorted(NamedTuple):
    """The pairs of a step by expert, and the tiles that they fill."""

    order: torch.Tensor  # int32 [P]: pairs, those of the first expert first
    ends: torch.Tensor  # int32 [E]: pairs of experts up to each one
    tile_ends: torch.Tensor  # int32 [E]: tiles likewise
    block_m: int  # pairs of a tile


class Unsorted(NamedTuple):
    """The pairs of so few tokens that all of them are a tile of each expert: none has an expert twice."""

    block_m: int = LOWEST_BLOCK


def sort_pairs(ids: torch.Tensor, num_experts: int, block_m: int) -> Sorted:
    """Return the pairs of ids [T, k] by expert and in order, in tiles of `block_m`.

    Ids beyond the last expert are left out. On one device it must not run on two streams at once.
    """
    num_pairs = ids.numel()
    ends, tile_ends = torch.empty(2, num_experts, dtype=torch.int32, device=ids.device)
    order = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    options: dict[str, Any] = {"BLOCK_E": next_power_of_2(num_experts), **launch_options(ids.device, num_warps=4)}
    if num_pairs <= MAX_COMPARED_PAIRS:
        rows, columns = next(sizes for most, sizes in COMPARED.items() if num_pairs <= most)
        _compare_kernel[(1 + cdiv(num_pairs, rows),)](
            ids, ends, tile_ends, order, num_pairs, num_experts, block_m, BLOCK_M=rows, BLOCK=columns, **options
        )  # fmt: skip
    else:
        chunk = max(SORT_BLOCK, next_power_of_2(cdiv(num_pairs, MAX_CHUNKS)))
        num_chunks = cdiv(num_pairs, chunk)
        starts = torch.empty(num_chunks, num_experts, dtype=torch.int32, device=ids.device)
        _count_kernel[(num_chunks,)](
            ids, starts, ends, tile_ends, arrival_counters(ids.device, 1), num_pairs, num_experts, block_m,
            CHUNK=chunk, BLOCK=SORT_BLOCK, BLOCK_C=MAX_CHUNKS, **options,
        )  # fmt: skip
        del options["BLOCK_E"]
        _place_kernel[(cdiv(num_experts, PLACED_EXPERTS), num_chunks)](
            ids, starts, order, num_pairs, num_experts,
            CHUNK=chunk, BLOCK=SORT_BLOCK, GROUP=PLACED_EXPERTS, **options,
        )  # fmt: skip
    return Sorted(order, ends, tile_ends, block_m)


class Codes(NamedTuple):
    """A stack's tensors, as `kernels.quantized` has them, or plain numbers; and how they are coded."""

    data: torch.Tensor  # [E n, k], or codes, those of e4m3 as uint8
    k: int
    code: str | None = None  # None: plain numbers; "fp4": E2M1, two a byte as of "int4"
    scale: torch.Tensor | None = None  # [E n, G]
    zero: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    table: torch.Tensor | None = None  # float32 [16]
    group_size: int = 0
    offset: int = 0

    @property
    def num_groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[1]


def kernel_code(code: str | None, device: torch.device) -> str | None:
    """Return how kernels read codes on a device."""
    return "castable fp8" if code == "fp8" and has_e4m3(device) else code


def fitting_block(codes: Codes, block_k: int) -> int:
    """Return the largest power of two up to `block_k` that is whole groups, or a whole part of one."""
    if codes.code is None or codes.group_size >= codes.k:
        return block_k
    while codes.group_size % block_k and block_k % codes.group_size:
        block_k //= 2
    return block_k


def expert_products_triton(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: Codes,
    num_experts: int,
    act: str | None,
    by_expert: Sorted | Unsorted | None,
    bias: torch.Tensor | None = None,
    *,
    is_shared_out: bool = False,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Return each pair's product with its expert's rows of `weight` [E n, k]: [P, n], or [P, n / 2] with `act`.

    bias: [E n]. by_expert: of `sort_pairs`; None: pairs are taken one by one. is_shared_out: ids may be of no expert
    here, and such pairs' products are left undefined.
    """
    num_pairs, k = ids.numel(), weight.k
    rows = weight.data.shape[0] // num_experts
    n = rows // 2 if act else rows
    per_input = num_pairs // len(x)
    out = torch.empty(num_pairs, n, dtype=x.dtype, device=x.device)
    tensors = weight.data, weight.scale, weight.zero, weight.minimum, weight.table
    code = kernel_code(weight.code, x.device)
    format_of = {
        "K": k, "CODE": code, "GROUP": weight.group_size if weight.group_size < k else WHOLE_ROW,
        "NUM_GROUPS": weight.num_groups, "OFFSET": weight.offset,
    }  # fmt: skip
    if by_expert is None:
        block_n, block_k = PAIR_BLOCKS.get(code or "", OTHER_PAIR_BLOCKS)[act is None]
        _pair_kernel[(num_pairs, cdiv(n, block_n))](
            x, *tensors, bias, ids, out, n, rows, per_input, **format_of, NUM_HELD=num_experts if is_shared_out else 0,
            BLOCK_N=block_n, BLOCK_K=fitting_block(weight, block_k), ACT=act, **launch_options(x.device, num_warps=4),
        )  # fmt: skip
        return out
    block_m = next_power_of_2(max(by_expert.block_m, LOWEST_BLOCK))
    if config is None:
        is_wide = x.dtype.itemsize == 4
        config = WIDE_TILE if is_wide else TILE_CONFIGS.get(x.device, rows, k, TILE_CODES.index(code), block_m)
    if isinstance(by_expert, Sorted):
        num_tiles = min(num_pairs, cdiv(num_pairs, by_expert.block_m) + num_experts)
        found, top_k = (by_expert.order, by_expert.ends, by_expert.tile_ends), 0
    else:
        num_tiles, found, top_k = num_experts, (ids, None, None), ids.shape[1]
    _tile_kernel[(cdiv(n, config.block_n), num_tiles)](
        x, *tensors, bias, *found, out, n, rows, per_input, len(ids), **format_of, TOP_K=top_k,
        NUM_EXPERTS=num_experts, BLOCK_E=next_power_of_2(num_experts), TILE=by_expert.block_m, BLOCK_M=block_m,
        BLOCK_N=config.block_n, BLOCK_K=fitting_block(weight, config.block_k), ACT=act,
        **launch_options(x.device, num_warps=config.num_warps), num_stages=config.num_stages,
    )  # fmt: skip
    return out


def permuted_triton(x: torch.Tensor) -> torch.Tensor:
    """Return rows x [P, K] with the inputs of each 128 in the order in which `fp4_prompts.cu` decodes their weights.

    A thread decodes a word of 8 codes to the pairs (0, 4), (1, 5), (2, 6), (3, 7); a row is filled up to whole 128.
    """
    num_rows, k = x.shape
    width = cdiv(k, 128) * 128
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    block = 1024
    _permute_kernel[(num_rows, cdiv(width, block))](
        x, out, k, width, BLOCK=block, **launch_options(x.device, num_warps=4)
    )
    return out


def combine_triton(
    products: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor | None, *, has_gaps: bool = False
) -> torch.Tensor:
    num_tokens, top_k = weights.shape
    n = products.shape[1]
    out = torch.empty(num_tokens, n, dtype=products.dtype, device=products.device)
    block = 1024
    _combine_kernel[(num_tokens, cdiv(n, block))](
        products, weights, residual, out, n, TOP_K=top_k, HAS_GAPS=has_gaps, BLOCK=block,
        **launch_options(products.device, num_warps=4),
    )  # fmt: skip
    return out


@fast_launch
@triton.jit(do_not_specialize=["NUM_PAIRS"])
def _compare_kernel(
    ids, ends, tile_ends, order, NUM_PAIRS, NUM_EXPERTS, TILE,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Count the pairs of each expert in the first program; find what comes before each pair in the others."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tl.program_id(0) == 0:
        expert = tl.arange(0, BLOCK_E)
        counts = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, NUM_PAIRS, BLOCK):
            chosen = load_chosen(ids, start, NUM_PAIRS, NUM_EXPERTS, BLOCK)
            counts += tl.histogram(chosen, BLOCK_E, mask=chosen < NUM_EXPERTS)
        is_expert = expert < NUM_EXPERTS
        tl.store(ends + expert, tl.cumsum(counts, axis=0), mask=is_expert)
        tl.store(tile_ends + expert, tl.cumsum((counts + TILE - 1) // TILE, axis=0), mask=is_expert)
        return
    pair = (tl.program_id(0) - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_pair = pair < NUM_PAIRS
    own = tl.load(ids + pair, mask=is_pair, other=0).to(tl.int32)
    place = tl.zeros([BLOCK_M], tl.int32)  # as many pairs as come before it
    for start in range(0, NUM_PAIRS, BLOCK):
        other = start + tl.arange(0, BLOCK)
        chosen = tl.load(ids + other, mask=other < NUM_PAIRS, other=NUM_EXPERTS + 1).to(tl.int32)
        is_before = (chosen[None, :] == own[:, None]) & (other[None, :] < pair[:, None])
        place += tl.sum(((chosen[None, :] < own[:, None]) | is_before).to(tl.int32), axis=1)
    tl.store(order + place, pair, mask=is_pair & (own < NUM_EXPERTS))


@fast_launch
@triton.jit(do_not_specialize=["NUM_PAIRS"])
def _count_kernel(
    ids, starts, ends, tile_ends, arrivals, NUM_PAIRS, NUM_EXPERTS, TILE,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Count each expert's pairs of a chunk; the last program finds where each chunk's have places."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    chunk = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    is_expert = e < NUM_EXPERTS
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, CHUNK, BLOCK):
        chosen = load_chosen(ids, chunk * CHUNK + start, NUM_PAIRS, NUM_EXPERTS, BLOCK)
        counts += tl.histogram(chosen, BLOCK_E, mask=chosen < NUM_EXPERTS)
    tl.store(starts + chunk * NUM_EXPERTS + e, counts, mask=is_expert)
    tl.debug_barrier()  # counts are written before their arrival counts
    num_chunks = tl.num_programs(0)
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_chunks - 1:
        tl.store(arrivals, 0)
        c = tl.arange(0, BLOCK_C)
        places = starts + c[:, None] * NUM_EXPERTS + e[None, :]
        is_count = (c < num_chunks)[:, None] & is_expert[None, :]
        all_counts = tl.load(places, mask=is_count, other=0, cache_modifier=".cg")
        totals = tl.sum(all_counts, axis=0)
        own_ends = tl.cumsum(totals, axis=0)
        tl.store(ends + e, own_ends, mask=is_expert)
        tl.store(tile_ends + e, tl.cumsum((totals + TILE - 1) // TILE, axis=0), mask=is_expert)
        tl.store(places, (own_ends - totals)[None, :] + tl.cumsum(all_counts, axis=0) - all_counts, mask=is_count)


@fast_launch
@triton.jit(do_not_specialize=["NUM_PAIRS"])
def _place_kernel(
    ids, starts, order, NUM_PAIRS, NUM_EXPERTS,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Put a chunk's pairs of a group of experts where they belong."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    chunk = tl.program_id(1)
    is_expert = expert < NUM_EXPERTS
    place = tl.load(starts + chunk * NUM_EXPERTS + expert, mask=is_expert, other=0)
    for start in range(0, CHUNK, BLOCK):
        chosen = load_chosen(ids, chunk * CHUNK + start, NUM_PAIRS, NUM_EXPERTS, BLOCK)
        is_chosen = (chosen[None, :] == expert[:, None]) & is_expert[:, None]
        numbers = tl.cumsum(is_chosen.to(tl.int32), axis=1)
        pair = chunk * CHUNK + start + tl.arange(0, BLOCK)
        tl.store(order + place[:, None] + numbers - 1, pair[None, :] + tl.zeros_like(numbers), mask=is_chosen)
        place += tl.sum(is_chosen.to(tl.int32), axis=1)


@triton.jit
def load_chosen(ids, start, NUM_PAIRS, NUM_EXPERTS, BLOCK: tl.constexpr):
    """Load the experts of BLOCK pairs; those past the end have none."""
    pair = start + tl.arange(0, BLOCK)
    return tl.load(ids + pair, mask=pair < NUM_PAIRS, other=NUM_EXPERTS).to(tl.int32)


@triton.jit
def decoded(
    weight, scale, zero, minimum, table, rows, start,
    K: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load rows [BLOCK_N] of a stack from input `start` on: [BLOCK_N, BLOCK_K], plain as they are, else float32."""
    k = tl.arange(0, BLOCK_K)
    is_input = (start + k < K)[None, :]
    if CODE is None:
        return tl.load(weight + rows[:, None] * K + start + k[None, :], mask=is_input, other=0.0)
    elif GROUP >= BLOCK_K:
        values = numbers_of(weight, table, rows, start, K, CODE, OFFSET, BLOCK_N, BLOCK_K)
        group = rows * NUM_GROUPS + start // GROUP
        if zero is not None:
            values -= tl.load(zero + group).to(tl.float32)[:, None]
        values *= whole_scale(tl.load(scale + group), CODE)[:, None]
        if minimum is not None:
            values -= tl.load(minimum + group).to(tl.float32)[:, None]
        return values
    else:
        values = numbers_of(weight, table, rows, start, K, CODE, OFFSET, BLOCK_N, BLOCK_K)
        index = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        group = rows[:, None] * NUM_GROUPS + index[None, :]
        is_group = (index < NUM_GROUPS)[None, :]
        values = tl.reshape(values, [BLOCK_N, BLOCK_K // GROUP, GROUP])
        if zero is not None:
            values -= tl.load(zero + group, mask=is_group, other=0).to(tl.float32)[:, :, None]
        values *= whole_scale(tl.load(scale + group, mask=is_group, other=0.0), CODE)[:, :, None]
        if minimum is not None:
            values -= tl.load(minimum + group, mask=is_group, other=0.0).to(tl.float32)[:, :, None]
        return tl.reshape(values, [BLOCK_N, BLOCK_K])


@triton.jit
def whole_scale(scale, CODE: tl.constexpr):
    """Return scales for what `numbers_of` returns, float32."""
    return scale.to(tl.float32) * 16384.0 if CODE == "fp4" else scale.to(tl.float32)


@triton.jit
def two_halves(signs, others):
    """Return the numbers that two e2m1s in each int32 stand for over 2^14, the low half's first: [..., 2]."""
    bits = (signs & -2147450880) | (others & 0x0E000E00)
    low = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.join(low, (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def numbers_of(
    weight, table, rows, start,
    K: tl.constexpr, CODE: tl.constexpr, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load what codes stand for before zeros and scales, float32 [BLOCK_N, BLOCK_K]; of FP4 a 2^14th of it."""
    if CODE == "fp4":
        # Sign, exponent and mantissa of two codes at once go to where two float16s have them: reading a table, code by
        # code, takes longer than the memory does.
        word = tl.arange(0, BLOCK_K // 8)
        pointers = weight + rows[:, None] * (K // 8) + start // 8 + word[None, :]
        codes = tl.load(pointers, mask=(start + 8 * word < K)[None, :], other=0)
        even = tl.join(two_halves(codes << 12, codes << 9), two_halves(codes << 4, codes << 1))
        odd = tl.join(two_halves(codes << 8, codes << 5), two_halves(codes, codes >> 3))
        return tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_K])
    elif CODE == "int4":
        byte = tl.arange(0, BLOCK_K // 2)
        pointers = weight + rows[:, None] * (K // 2) + start // 2 + byte[None, :]
        codes = tl.load(pointers, mask=(start + 2 * byte < K)[None, :], other=0)
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), [BLOCK_N, BLOCK_K])
        if table is not None:
            return tl.load(table + codes.to(tl.int32))
        else:
            return codes.to(tl.float32) - OFFSET
    else:
        k = tl.arange(0, BLOCK_K)
        codes = tl.load(weight + rows[:, None] * K + start + k[None, :], mask=(start + k < K)[None, :], other=0)
        if CODE == "castable fp8":
            return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            return number_of(codes, CODE)


@fast_launch
@triton.jit
def _pair_kernel(
    x, weight, scale, zero, minimum, table, bias, ids, out, N, ROWS, PER_INPUT,
    K: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, OFFSET: tl.constexpr,
    NUM_HELD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    expert = tl.load(ids + pair)
    if NUM_HELD > 0 and expert >= NUM_HELD:
        return
    gate = expert * ROWS + row
    source = x + (pair // PER_INPUT) * K
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_input = k < K
        values = tl.load(source + k, mask=is_input, other=0.0).to(tl.float32)
        tile = decoded(
            weight, scale, zero, minimum, table, gate, start, K, CODE, GROUP, NUM_GROUPS, OFFSET, BLOCK_N, BLOCK_K
        )
        sums += tile * values[None, :]
        if ACT is not None:
            tile = decoded(
                weight, scale, zero, minimum, table, gate + N, start, K, CODE, GROUP, NUM_GROUPS, OFFSET, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
            up_sums += tile * values[None, :]
    result = tl.sum(sums, axis=1)
    if bias is not None:
        result += tl.load(bias + gate).to(tl.float32)
    if ACT is not None:
        up = tl.sum(up_sums, axis=1)
        if bias is not None:
            up += tl.load(bias + gate + N).to(tl.float32)
        result = gated(result, up, ACT)
    tl.store(out + pair.to(tl.int64) * N + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def pairs_of(ids, expert, NUM_TOKENS, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return which of BLOCK_T tokens have chosen an expert, and their pairs with it."""
    BLOCK_TOP: tl.constexpr = triton.next_power_of_2(TOP_K)
    token, place = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_TOP)
    mask = (token < NUM_TOKENS)[:, None] & (place < TOP_K)[None, :]
    chosen = tl.load(ids + token[:, None] * TOP_K + place[None, :], mask=mask, other=-1)
    # Where logits are no numbers, as rows of padding may have them, an expert may be chosen twice.
    last = tl.max(tl.where(chosen == expert, place[None, :], -1), axis=1)
    return last >= 0, (token * TOP_K + tl.maximum(last, 0)).to(tl.int64)


@fast_launch
@triton.jit(do_not_specialize=["NUM_TOKENS"])
def _tile_kernel(
    x, weight, scale, zero, minimum, table, bias, order, ends, tile_ends, out, N, ROWS, PER_INPUT, NUM_TOKENS,
    K: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, OFFSET: tl.constexpr,
    TOP_K: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if TOP_K > 0:
        expert = tl.program_id(1)
        is_pair, pairs = pairs_of(order, expert, NUM_TOKENS, TOP_K, BLOCK_M)
        if tl.sum(is_pair.to(tl.int32), axis=0) == 0:
            return
    else:
        tile = tl.program_id(1)
        experts = tl.arange(0, BLOCK_E)
        all_tile_ends = tl.load(tile_ends + experts, mask=experts < NUM_EXPERTS, other=2147483647)
        expert = tl.sum((all_tile_ends <= tile).to(tl.int32), axis=0)
        if expert >= NUM_EXPERTS:
            return
        first_tile = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
        first = tl.load(ends + expert - 1, mask=expert > 0, other=0) + (tile - first_tile) * TILE
        m = first + tl.arange(0, BLOCK_M)
        is_pair = m < tl.minimum(tl.load(ends + expert), first + TILE)
        pairs = tl.load(order + m, mask=is_pair, other=0).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K)
    sources = x + (pairs // PER_INPUT)[:, None] * K + k[None, :]
    gate = expert.to(tl.int64) * ROWS + row
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        is_input = k < K - start
        values = tl.load(sources + start, mask=is_pair[:, None] & is_input[None, :], other=0.0)
        numbers = decoded(
            weight, scale, zero, minimum, table, gate, start, K, CODE, GROUP, NUM_GROUPS, OFFSET, BLOCK_N, BLOCK_K
        )
        sums = tl.dot(values, tl.trans(numbers.to(values.dtype)), sums, input_precision="ieee")
        if ACT is not None:
            numbers = decoded(
                weight, scale, zero, minimum, table, gate + N, start, K, CODE, GROUP, NUM_GROUPS, OFFSET, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
            up_sums = tl.dot(values, tl.trans(numbers.to(values.dtype)), up_sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + gate).to(tl.float32)[None, :]
    if ACT is not None:
        if bias is not None:
            up_sums += tl.load(bias + gate + N).to(tl.float32)[None, :]
        sums = gated(sums, up_sums, ACT)
    places = out + pairs[:, None] * N + n[None, :]
    tl.store(places, sums.to(out.dtype.element_ty), mask=is_pair[:, None] & (n < N)[None, :])


@fast_launch
@triton.jit
def _permute_kernel(x, out, K, WIDTH, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    thread, word, pair = place // 2 % 4, place // 32 % 4, place // 16 % 2 * 2 + place // 8 % 2
    k = place // 128 * 128 + 32 * thread + 8 * word + pair + 4 * (place % 2)
    tl.store(out + row * WIDTH + place, tl.load(x + row * K + k, mask=k < K, other=0.0), mask=place < WIDTH)


@fast_launch
@triton.jit
def _combine_kernel(
    products, weights, residual, out, N,
    TOP_K: tl.constexpr, HAS_GAPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_output = n < N
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        weight = tl.load(weights + token * TOP_K + i)
        is_wanted = n < tl.where(weight == 0, 0, N) if HAS_GAPS else is_output
        value = tl.load(products + (token * TOP_K + i) * N + n, mask=is_wanted, other=0.0).to(tl.float32)
        total += value * weight
    if residual is not None:
        total += tl.load(residual + token * N + n, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=is_output)

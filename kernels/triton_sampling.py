"""The Triton kernels of `sampling`. No row is sorted."""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch, next_power_of_2
from kernels.triton_elementwise import launch_options, wait_for_input

PIECE_BLOCK = 2048  # logits that a program of the first pass reads together: 8 a thread
NUM_PROGRAMS = 1024  # least programs of the first pass, if the rows are long enough
ROW_BLOCK, ROW_WARPS = 4096, 16
GROUP_SIZE = 128  # tokens of a piece whose largest logit is kept: where a row's largest logits may lie
MAX_LISTED_K = 512  # a top_k up to which the tokens that it keeps are listed and ranked, and not found by redrawing
LIST_SIZE = 2 * MAX_LISTED_K  # there may be more tokens than top_k keeps, as the limit is known by groups alone


def argmax_triton(logits: torch.Tensor) -> torch.Tensor:
    return _sample_triton(logits, None)


def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    return _sample_triton(logits, (rows, temperature, top_k, top_p, min_p, seed, position))


def _sample_triton(logits: torch.Tensor, params: tuple[torch.Tensor | None, ...] | None) -> torch.Tensor:
    """Return each row's token, without params its argmax. Two launches: the winner of each piece, then of the row."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return token_ids
    num_pieces, num_blocks = _cut_row(num_rows, vocab_size)
    values = torch.empty(2, num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    groups_a_piece = num_blocks * PIECE_BLOCK // GROUP_SIZE
    num_groups = num_pieces * groups_a_piece
    groups = lists = None
    if params is not None:
        groups = torch.empty(num_rows, num_groups, dtype=torch.float32, device=logits.device)
        lists = torch.empty(num_rows, num_groups + 2 * LIST_SIZE, dtype=torch.int32, device=logits.device)
    rows, temperature, top_k, top_p, min_p, seed, position = params or (None,) * 7
    _piece_winner_kernel[(num_rows, num_pieces)](
        logits,
        rows,
        temperature,
        top_k,
        seed,
        position,
        values,
        ids,
        groups,
        logits.stride(0),
        num_blocks,
        V=vocab_size,
        NUM_GROUPS=0 if params is None else groups_a_piece,  # 0: one kernel for pieces of any length
        MAX_LISTED_K=MAX_LISTED_K,
        BLOCK=PIECE_BLOCK,
        **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
    )
    _row_winner_kernel[(num_rows,)](
        logits,
        rows,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        values,
        ids,
        groups,
        lists,
        token_ids,
        logits.stride(0),
        num_pieces,
        num_groups,
        groups_a_piece,
        V=vocab_size,
        # Low bits of a logit's float32 that are always the same.
        UNUSED_BITS={torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[logits.dtype],
        GROUP_SIZE=GROUP_SIZE,
        MAX_LISTED_K=MAX_LISTED_K,
        LIST_SIZE=LIST_SIZE,
        PIECE_BLOCK=PIECE_BLOCK,
        # Of the most pieces that rows of this length are cut into: one kernel for any number of rows.
        BLOCK_PIECES=next_power_of_2(cdiv(vocab_size, PIECE_BLOCK)),
        BLOCK_GROUPS=next_power_of_2(cdiv(vocab_size, PIECE_BLOCK)) * PIECE_BLOCK // GROUP_SIZE,
        BLOCK=ROW_BLOCK,
        **launch_options(logits.device, num_warps=4 if params is None else ROW_WARPS),
    )
    return token_ids


def _cut_row(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Return (pieces a row, blocks a piece): enough pieces that a few rows fill the device, too.

    Blocks are powers of 2: a kernel is compiled for each number of them. A group has a token of each at least.
    """
    num_blocks = cdiv(vocab_size, PIECE_BLOCK)
    blocks_a_piece = min(next_power_of_2(cdiv(num_blocks * num_rows, NUM_PROGRAMS)), GROUP_SIZE)
    return cdiv(num_blocks, blocks_a_piece), blocks_a_piece


@fast_launch
@triton.jit
def _piece_winner_kernel(
    logits,
    rows,
    temperature,
    top_k,
    seed,
    position,
    values,
    ids,
    groups,
    logits_stride,
    num_blocks,
    V: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MAX_LISTED_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store a piece's largest logit (NaN if one is), and its largest logit / temperature + noise with that one's id.

    Also the largest logit of each of its groups: a group has the same few lanes of each block. Rows whose top_k is
    small need no more than these, and get no noise.
    """
    wait_for_input(PDL)
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_stride
    start = tl.program_id(1) * num_blocks * BLOCK
    piece = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if temperature is None:
        largest, best, best_id, _ = _best_of_piece(logits, start, num_blocks, 1.0, 0, 0, True, V, BLOCK)
    else:
        entry = row
        if rows is not None:
            entry = tl.load(rows + row)
        temp = tl.load(temperature + entry)
        if (temp < 1e-6) | (tl.load(top_k + entry) <= MAX_LISTED_K):
            largest, best, best_id, lanes = _best_of_piece(logits, start, num_blocks, 1.0, 0, 0, True, V, BLOCK)
        else:
            key1, key2 = _noise_keys(tl.load(seed + entry), tl.load(position + row))
            largest, best, best_id, lanes = _best_of_piece(
                logits, start, num_blocks, 1.0 / temp, key1, key2, False, V, BLOCK
            )
        of_groups = tl.max(tl.reshape(lanes, [NUM_GROUPS, BLOCK // NUM_GROUPS]), axis=1)
        tl.store(groups + piece * NUM_GROUPS + tl.arange(0, NUM_GROUPS), of_groups)
    tl.store(values + piece, largest)
    tl.store(values + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) + piece, best)
    tl.store(ids + piece, best_id)


@triton.jit
def _best_of_piece(
    logits,
    start,
    num_blocks,
    inverse,
    key1,
    key2,
    IS_GREEDY: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    has_nan = tl.zeros([BLOCK], tl.int32)
    for i in range(num_blocks):
        token_id = start + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
        has_nan |= (x != x).to(tl.int32)
        largest = tl.maximum(x, largest)
        if not IS_GREEDY:
            x = x * inverse + _gumbel_noise(key1, key2, token_id)
        best_id = tl.where(x > best, token_id, best_id)
        best = tl.maximum(x, best)
    nan_or_largest = tl.where(tl.max(has_nan, axis=0) > 0, float("nan"), tl.max(largest, axis=0))
    winner = tl.max(best, axis=0)
    return nan_or_largest, winner, tl.min(tl.where(best == winner, best_id, 0x7FFFFFFF), axis=0), largest


@fast_launch
@triton.jit
def _row_winner_kernel(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    values,
    ids,
    groups,
    lists,
    token_ids,
    logits_stride,
    num_pieces,
    num_groups,
    groups_a_piece,
    V: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    MAX_LISTED_K: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    PIECE_BLOCK: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store the winner over the tokens kept: by a list of them where top_k is small, else by drawing until one is."""
    wait_for_input(PDL)
    row = tl.program_id(0)
    piece = tl.arange(0, BLOCK_PIECES)
    first_piece = row.to(tl.int64) * num_pieces
    is_piece = piece < num_pieces
    maxima = tl.load(values + first_piece + piece, mask=is_piece, other=float("-inf"))
    values += tl.num_programs(0).to(tl.int64) * num_pieces
    best = tl.load(values + first_piece + piece, mask=is_piece, other=float("-inf"))
    best_id = tl.load(ids + first_piece + piece, mask=is_piece, other=0x7FFFFFFF)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), best_id, 0x7FFFFFFF), axis=0)
    largest = tl.max(maxima, axis=0)
    has_nan = tl.max((maxima != maxima).to(tl.int32), axis=0) > 0
    if has_nan | (largest == float("-inf")) | (largest == float("inf")):
        winner = -1
    elif temperature is not None:
        entry = row
        if rows is not None:
            entry = tl.load(rows + row)
        k = tl.load(top_k + entry)
        p = tl.load(top_p + entry)
        least = tl.load(min_p + entry)
        temp = tl.load(temperature + entry)
        is_listed = k <= MAX_LISTED_K
        if (temp >= 1e-6) & (k != 1) & (is_listed | (k < V) | (p < 1.0) | (least > 0.0)):
            logits += row.to(tl.int64) * logits_stride
            inverse = 1.0 / temp
            floor = tl.where(least > 0.0, largest * inverse + tl.log(tl.maximum(least, 1e-38)), float("-inf"))
            key1, key2 = _noise_keys(tl.load(seed + entry), tl.load(position + row))
            if is_listed:
                winner = _listed_winner(
                    logits, groups + row.to(tl.int64) * num_groups,
                    lists + row.to(tl.int64) * (num_groups + 2 * LIST_SIZE), num_groups, groups_a_piece,
                    largest, inverse, k, p, floor, key1, key2,
                    V, GROUP_SIZE, PIECE_BLOCK, BLOCK_GROUPS, LIST_SIZE,
                )  # fmt: skip
                is_listed = winner >= 0
                if not is_listed:  # the pieces' winners had no noise
                    winner = _draw_above(logits, float("-inf"), floor, inverse, key1, key2, V, BLOCK)
            if not is_listed:
                if (k < V) | (p < 1.0):
                    winner = _kept_winner(
                        logits, winner, largest, inverse, k, p, floor, key1, key2, V, UNUSED_BITS, BLOCK
                    )
                elif tl.load(logits + winner).to(tl.float32) * inverse < floor:
                    winner = _draw_above(logits, float("-inf"), floor, inverse, key1, key2, V, BLOCK)
    tl.store(token_ids + row, winner)


@triton.jit
def _listed_winner(
    logits,
    groups,
    lists,
    num_groups,
    groups_a_piece,
    largest,
    inverse,
    k,
    p,
    floor,
    key1,
    key2,
    V: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PIECE_BLOCK: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
):
    """Return the winner over the tokens kept, or -1 if too many logits lie near the k-th largest to list them.

    At least k tokens have logits of the k-th largest group's at least; they lie in groups that do, too. Each token
    that is listed then counts those above it and their mass. Masses are summed as integers: in whatever order the
    batch's cut of the row brings them, the sum is the same.
    """
    group = tl.arange(0, BLOCK_GROUPS)
    maxima = tl.load(groups + group, mask=group < num_groups, other=float("-inf"))
    limit = _kth_at_least(maxima, largest, k)
    num_hits = _append(lists, 0, group, (maxima >= limit) & (maxima > float("-inf")), BLOCK_GROUPS)
    tl.debug_barrier()

    values = lists + num_groups
    ids = values + LIST_SIZE
    num_listed = 0
    lanes = PIECE_BLOCK // groups_a_piece
    member = tl.arange(0, GROUP_SIZE)
    offset = (member // lanes) * PIECE_BLOCK + member % lanes
    HITS: tl.constexpr = 32  # more at once take more registers
    for first in range(0, num_hits, HITS):
        hit = first + tl.arange(0, HITS)
        found = tl.load(lists + hit, mask=hit < num_hits, other=0)
        start = found // groups_a_piece * (PIECE_BLOCK * (GROUP_SIZE // lanes)) + found % groups_a_piece * lanes
        token_id = tl.reshape(start[:, None] + offset[None, :], [HITS * GROUP_SIZE])
        is_there = tl.reshape((hit < num_hits)[:, None] & (offset >= 0)[None, :], [HITS * GROUP_SIZE]) & (token_id < V)
        x = tl.load(logits + token_id, mask=is_there, other=float("-inf")).to(tl.float32)
        is_near = (x >= limit) & (x > float("-inf"))
        _append(values, num_listed, x.to(tl.int32, bitcast=True), is_near, LIST_SIZE)
        num_listed = _append(ids, num_listed, token_id, is_near, LIST_SIZE)
    tl.debug_barrier()

    winner = -1
    if num_listed <= LIST_SIZE:
        entry = tl.arange(0, LIST_SIZE)
        x = _listed(values, entry, num_listed)
        num_above = tl.zeros([LIST_SIZE], tl.int32)
        mass_above = tl.zeros([LIST_SIZE], tl.int64)
        OTHERS: tl.constexpr = 8
        for first in range(0, num_listed, OTHERS):
            other = _listed(values, first + tl.arange(0, OTHERS), num_listed)
            is_above = other[None, :] > x[:, None]
            num_above += tl.sum(is_above.to(tl.int32), axis=1)
            mass_above += tl.sum(tl.where(is_above, _whole_mass(other, largest, inverse)[None, :], 0), axis=1)
        is_kept = (entry < num_listed) & (num_above < k)
        mass = tl.sum(tl.where(is_kept, _whole_mass(x, largest, inverse), 0), axis=0)
        share = tl.where(p < 1.0, p, float("inf"))
        is_kept &= (mass_above.to(tl.float32) < share * mass.to(tl.float32)) & (x * inverse >= floor)
        token_id = tl.load(ids + entry, mask=entry < num_listed, other=0x7FFFFFFF)
        noisy = tl.where(is_kept, x * inverse + _gumbel_noise(key1, key2, token_id), float("-inf"))
        winner = tl.min(tl.where(is_kept & (noisy == tl.max(noisy, axis=0)), token_id, 0x7FFFFFFF), axis=0)
    return winner


@triton.jit
def _kth_at_least(values, largest, k):
    """Return a limit that at least k of the values reach, near the k-th largest; -inf if fewer than k are finite."""
    is_finite = values > float("-inf")
    low = tl.min(tl.where(is_finite, values, largest), axis=0)
    high = largest
    for _ in range(14):  # to a 16,000th of their range
        middle = low * 0.5 + high * 0.5
        is_enough = tl.sum((values >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return tl.where(tl.sum(is_finite.to(tl.int32), axis=0) >= k, low, float("-inf"))


@triton.jit
def _append(places, num_before, values, is_wanted, SIZE: tl.constexpr):
    """Store those of the values that are wanted behind num_before others, in order. Returns how many there are then.

    Those for which there is no place are counted only.
    """
    wanted = is_wanted.to(tl.int32)
    place = num_before + tl.cumsum(wanted, axis=0) - 1
    tl.store(places + place, values, mask=is_wanted & (place < SIZE))
    return num_before + tl.sum(wanted, axis=0)


@triton.jit
def _listed(values, entry, num_listed):
    bits = tl.load(values + entry, mask=entry < num_listed, other=-0x800000)  # of -inf
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _whole_mass(x, largest, inverse):
    """Return exp((x - largest) / temperature) in units of 2^-30."""
    return (tl.exp((x - largest) * inverse) * 1073741824.0 + 0.5).to(tl.int64)


@triton.jit
def _kept_winner(
    logits,
    winner,
    largest,
    inverse,
    k,
    p,
    floor,
    key1,
    key2,
    V: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the winner over the tokens kept, without knowing which they are.

    While the winner is not one of them, none at or below it is (the kept ones are the head of the order), so draw again
    above it, with the same noise. That ends with the token that a draw over the kept ones alone would give; seldom is a
    second draw needed. (FlashInfer's rejection sampling draws anew instead.)
    """
    mass_in_top_k = -1.0  # not known yet
    below_top_k = tl.full([], float("-inf"), tl.float32)
    is_searching = True
    while is_searching:
        x = tl.load(logits + winner).to(tl.float32)
        num_above, num_equal, mass_above, mass = _count_above(logits, x, largest, inverse, V, BLOCK)
        is_kept = (num_above < k) & (x * inverse >= floor)
        if is_kept & (p < 1.0) & (num_above > 0):
            weight = tl.exp((x - largest) * inverse)
            if k >= V:
                mass_in_top_k = mass
            at_least = mass_above + num_equal * weight
            at_most = tl.minimum(mass, mass_above + tl.maximum(num_equal, k - num_above) * weight)
            if mass_in_top_k >= 0.0:
                at_least = mass_in_top_k
                at_most = mass_in_top_k
            if mass_above >= p * at_most:
                is_kept = False
            elif mass_above >= p * at_least:
                # Only the exact mass of the top k can tell.
                mass_in_top_k = _mass_of_top_k(logits, below_top_k, x, k, largest, inverse, V, UNUSED_BITS, BLOCK)
                is_kept = mass_above < p * mass_in_top_k
        if is_kept | (num_above == 0):
            is_searching = False
        else:
            if num_above >= k:
                below_top_k = x
            winner = _draw_above(logits, x, floor, inverse, key1, key2, V, BLOCK)
    return winner


@triton.jit
def _count_above(logits, limit, largest, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return (tokens above limit, tokens at it, mass above it, mass of all).

    A token's mass is exp((logit - largest) / temperature).
    """
    num_above = tl.zeros([BLOCK], tl.int32)
    num_equal = tl.zeros([BLOCK], tl.int32)
    mass_above = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token_id = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - largest) * inverse)
        num_above += (x > limit).to(tl.int32)
        num_equal += (x == limit).to(tl.int32)
        mass_above += tl.where(x > limit, weight, 0.0)
        mass += weight
    return tl.sum(num_above, axis=0), tl.sum(num_equal, axis=0), tl.sum(mass_above, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _draw_above(logits, limit, floor, inverse, key1, key2, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the token with the largest logit / temperature + noise, of those with a logit above limit."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, V, BLOCK):
        token_id = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
        if tl.max(x, axis=0) > limit:  # few blocks hold any
            noisy = x * inverse + _gumbel_noise(key1, key2, token_id)
            is_better = (x > limit) & (x * inverse >= floor) & (noisy > best)
            best_id = tl.where(is_better, token_id, best_id)
            best = tl.where(is_better, noisy, best)
    return tl.min(tl.where(best == tl.max(best, axis=0), best_id, 0x7FFFFFFF), axis=0)


@triton.jit
def _mass_of_top_k(
    logits,
    below_top_k,
    in_top_k,
    k,
    largest,
    inverse,
    V: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the mass of the top k.

    The k-th largest logit lies in (below_top_k, in_top_k]: bisect the integers that order as the floats do.
    """
    low = _order(below_top_k, UNUSED_BITS)
    high = _order(in_top_k, UNUSED_BITS)
    while high - low > 1:
        # high: fewer than k lie above it, low: at least k do
        middle = low + (high - low) // 2
        num_above = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            token_id = start + tl.arange(0, BLOCK)
            x = tl.load(logits + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
            num_above += (_order(x, UNUSED_BITS) > middle).to(tl.int32)
        if tl.sum(num_above, axis=0) < k:
            high = middle
        else:
            low = middle
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token_id = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
        mass += tl.where(_order(x, UNUSED_BITS) >= high, tl.exp((x - largest) * inverse), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _order(x, UNUSED_BITS: tl.constexpr):
    """Return an int64 that orders as the float does, neighbours one apart."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNUSED_BITS).to(tl.int64)


@triton.jit
def _noise_keys(seed, position):
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key1 = _mix(low ^ _mix(high ^ _mix(position.to(tl.uint32) + 0x9E3779B9, 0), 0), 0)
    key2 = _mix(high ^ _mix(key1 + 0x7F4A7C15, 0), 0)
    return key1, key2


@triton.jit
def _gumbel_noise(key1, key2, token_id):
    bits = _mix(token_id.to(tl.uint32) * 0x9E3779B9 + key1, key2)
    uniform = tl.minimum(((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    # -log(1 - u): the logarithm has no accuracy left near 1, where the noise is largest
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.01, series, -0.6931471805599453 * tl.log2(1.0 - uniform))
    return -0.6931471805599453 * tl.log2(exponential)


@triton.jit
def _mix(x, key):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = ((x ^ (x >> 13)) + key) * 0xC2B2AE35
    return x ^ (x >> 16)


def apply_penalties_triton(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    num_rows, vocab_size = logits.shape
    if num_rows:
        _apply_penalties_kernel[(num_rows, cdiv(vocab_size, PIECE_BLOCK))](
            logits,
            rows,
            counts,
            frequency,
            presence,
            repetition,
            logits.stride(0),
            counts.stride(0),
            vocab_size,
            BLOCK=PIECE_BLOCK,
            **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
        )


@fast_launch
@triton.jit
def _apply_penalties_kernel(
    logits,
    rows,
    counts,
    frequency,
    presence,
    repetition,
    logits_stride,
    counts_stride,
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    i = tl.program_id(0)
    row = tl.load(rows + i)
    once_a_time = tl.load(frequency + row)
    once = tl.load(presence + row)
    factor = tl.load(repetition + row)
    if (once_a_time != 0.0) | (once != 0.0) | (factor != 1.0):
        token_id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_token = token_id < V
        pointers = logits + i.to(tl.int64) * logits_stride + token_id
        counts += row.to(tl.int64) * counts_stride
        count = tl.load(counts + token_id, mask=is_token, other=0).to(tl.int32)
        x = tl.load(pointers, mask=is_token, other=0.0).to(tl.float32)
        x = tl.where(count != 0, tl.where(x > 0, x / factor, x * factor), x)
        times = count & 0x3FFF
        x -= once_a_time * times.to(tl.float32) + tl.where(times > 0, once, 0.0)
        tl.store(pointers, x.to(logits.dtype.element_ty), mask=is_token)


def apply_token_bitmask_triton(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    vocab_size = logits.shape[1]
    num_masks = bitmask.shape[0]
    if num_masks:
        _apply_token_bitmask_kernel[(num_masks, cdiv(vocab_size, PIECE_BLOCK))](
            logits,
            bitmask,
            rows,
            logits.stride(0),
            bitmask.stride(0),
            vocab_size,
            BLOCK=PIECE_BLOCK,
            **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
        )


@fast_launch
@triton.jit
def _apply_token_bitmask_kernel(
    logits, bitmask, rows, logits_stride, bitmask_stride, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_for_input(PDL)
    i = tl.program_id(0)
    row = i
    if rows is not None:
        row = tl.load(rows + i)
    if row >= 0:
        token_id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(bitmask + i.to(tl.int64) * bitmask_stride + token_id // 32, mask=token_id < V, other=0)
        is_forbidden = ((words >> (token_id % 32)) & 1) == 0
        logits += row.to(tl.int64) * logits_stride
        forbidden = tl.full([BLOCK], float("-inf"), logits.dtype.element_ty)
        tl.store(logits + token_id, forbidden, mask=is_forbidden & (token_id < V))


def logsumexp_triton(logits: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    num_pieces, num_blocks = _cut_row(num_rows, vocab_size)
    of_pieces = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    if num_rows:
        _piece_logsumexp_kernel[(num_rows, num_pieces)](
            logits,
            of_pieces,
            logits.stride(0),
            num_blocks,
            V=vocab_size,
            BLOCK=PIECE_BLOCK,
            **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
        )
    return of_pieces.logsumexp(dim=-1)


@fast_launch
@triton.jit
def _piece_logsumexp_kernel(
    logits,
    of_pieces,
    logits_stride,
    num_blocks,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * num_blocks * BLOCK
    # Not -inf: of two such, the difference is no number.
    largest = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(num_blocks):
        token_id = start + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * logits_stride + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, x)
        total = total * tl.exp(largest - new_largest) + tl.exp(x - new_largest)
        largest = new_largest
    row_largest = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
    tl.store(of_pieces + row * tl.num_programs(1) + tl.program_id(1), row_largest + tl.log(total))

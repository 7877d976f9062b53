"""From logits to tokens: penalties, grammar masks, argmax, sampling and log-probabilities.

A row's token depends on its own logits, seed and position only: the noise is a hash of (seed, position, token id),
never the state of a generator, so neither the batch it runs in nor a retraction changes it.
"""

import torch
import triton
import triton.language as tl

from kernels.elementwise import launch_options, wait_for_input

GREEDY_TEMPERATURE = 1e-6
MAX_UNIFORM = 1 - 2.0**-24  # the largest float32 below 1
PROMPT_BIT = 1 << 14  # of an entry of `counts`: the token occurs in the prompt; the bits below: times generated
PIECE_BLOCK = 2048  # logits a program of the first pass looks at together: 8 a thread
NUM_PROGRAMS = 1024  # of the first pass, at least, if the rows are long enough
ROW_BLOCK, ROW_WARPS = 4096, 16


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first largest of each row, or -1 where a row holds a NaN or nothing but -inf; [S, V] -> int32 [S]."""
    return argmax_triton(logits) if logits.is_cuda else argmax_torch(logits)


def argmax_torch(logits: torch.Tensor) -> torch.Tensor:
    values, token_ids = logits.max(dim=-1)
    return torch.where(values > -torch.inf, token_ids, -1).to(torch.int32)


def argmax_triton(logits: torch.Tensor) -> torch.Tensor:
    return _sample_triton(logits, None)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """One token a row, or -1 where a row holds a NaN or nothing but -inf; logits [S, V] -> int32 [S].

    temperature, top_p, min_p fp32 [S]; top_k and position int32 [S]; seed int64 [S]. A row with a temperature below
    1e-6 or top_k 1 gets its argmax. Else, in this order and with ties at a limit all kept:
    top_k keeps the k most likely tokens; top_p keeps, of those, each token that has less than top_p of their mass
    before it; min_p keeps tokens at least min_p times as likely as the likeliest. Of what is kept, one token is drawn
    by its probability: the largest logit / temperature + Gumbel noise wins (Gumbel-max).
    """
    run = sample_triton if logits.is_cuda else sample_torch
    return run(logits, temperature, top_k, top_p, min_p, seed, position)


def sample_torch(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    vocab_size = logits.shape[-1]
    largest, first_largest = logits.max(dim=-1)
    scaled = logits.float() * temperature.clamp(min=GREEDY_TEMPERATURE).reciprocal().unsqueeze(1)
    floor = scaled.amax(dim=-1) + min_p.log()  # log(0) = -inf keeps all
    if bool(((top_k < vocab_size) | (top_p < 1)).any()):
        floor = torch.maximum(floor, _nucleus_floor(scaled, top_k.unsqueeze(1), top_p.unsqueeze(1)))
    noisy = (scaled + gumbel_noise(seed, position, vocab_size)).masked_fill_(scaled < floor.unsqueeze(1), -torch.inf)
    is_greedy = (temperature < GREEDY_TEMPERATURE) | (top_k == 1)
    token_ids = torch.where(is_greedy, first_largest, noisy.argmax(dim=-1))
    return torch.where(largest > -torch.inf, token_ids, -1).to(torch.int32)


def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    return _sample_triton(logits, (temperature, top_k, top_p, min_p, seed, position))


def _sample_triton(logits: torch.Tensor, params: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """Without params the argmax. Two launches: the winner of each piece of a row, then of the row."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return token_ids
    num_pieces, num_blocks = _cut_row(num_rows, vocab_size)
    values = torch.empty(2, num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    temperature, top_k, top_p, min_p, seed, position = params or (None,) * 6
    _piece_winner_kernel[(num_rows, num_pieces)](
        logits,
        temperature,
        top_k,
        seed,
        position,
        values,
        ids,
        logits.stride(0),
        V=vocab_size,
        NUM_BLOCKS=num_blocks,
        BLOCK=PIECE_BLOCK,
        **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
    )
    _row_winner_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        values,
        ids,
        token_ids,
        logits.stride(0),
        num_pieces,
        V=vocab_size,
        # How many of the low bits of a logit's float32 are always the same.
        UNUSED_BITS={torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[logits.dtype],
        BLOCK_PIECES=triton.next_power_of_2(num_pieces),
        BLOCK=ROW_BLOCK,
        **launch_options(logits.device, num_warps=4 if params is None else ROW_WARPS),
    )
    return token_ids


def _cut_row(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """(pieces, blocks a piece): enough pieces for a few rows, too, to fill the device; blocks are powers of 2, since
    a kernel is compiled for each number of them.
    """
    num_blocks = triton.cdiv(vocab_size, PIECE_BLOCK)
    blocks_a_piece = triton.next_power_of_2(triton.cdiv(num_blocks * num_rows, NUM_PROGRAMS))
    return triton.cdiv(num_blocks, blocks_a_piece), blocks_a_piece


@triton.jit
def _piece_winner_kernel(
    logits,
    temperature,
    top_k,
    seed,
    position,
    values,
    ids,
    logits_stride,
    V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one piece of a row: the largest logit (NaN if one is), the largest logit / temperature + noise and its id."""
    wait_for_input(PDL)
    row = tl.program_id(0)
    logits += row.to(tl.int64) * logits_stride
    start = tl.program_id(1) * NUM_BLOCKS * BLOCK
    if temperature is None:
        largest, best, best_id = _best_of_piece(logits, start, 1.0, 0, 0, True, V, NUM_BLOCKS, BLOCK)
    else:
        temp = tl.load(temperature + row)
        if (temp < 1e-6) | (tl.load(top_k + row) == 1):
            largest, best, best_id = _best_of_piece(logits, start, 1.0, 0, 0, True, V, NUM_BLOCKS, BLOCK)
        else:
            key1, key2 = _noise_keys(tl.load(seed + row), tl.load(position + row))
            largest, best, best_id = _best_of_piece(logits, start, 1.0 / temp, key1, key2, False, V, NUM_BLOCKS, BLOCK)
    piece = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + piece, largest)
    tl.store(values + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) + piece, best)
    tl.store(ids + piece, best_id)


@triton.jit
def _best_of_piece(
    logits,
    start,
    inverse,
    key1,
    key2,
    IS_GREEDY: tl.constexpr,
    V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    has_nan = tl.zeros([BLOCK], tl.int32)
    for i in range(NUM_BLOCKS):
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
    return nan_or_largest, winner, tl.min(tl.where(best == winner, best_id, 0x7FFFFFFF), axis=0)


@triton.jit
def _row_winner_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    values,
    ids,
    token_ids,
    logits_stride,
    num_pieces,
    V: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The winner over the tokens kept, without knowing which they are: while the winner is not one of them, none at
    or below it is (what is kept is the head of the order), so draw again above it, with the same noise. That ends
    with the token that a draw over the kept ones alone would give; seldom is a second draw needed.
    (FlashInfer's rejection sampling draws anew instead.)
    """
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
    if has_nan | (largest == float("-inf")):
        winner = -1
    elif temperature is not None:
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least = tl.load(min_p + row)
        temp = tl.load(temperature + row)
        if (temp >= 1e-6) & (k != 1) & ((k < V) | (p < 1.0) | (least > 0.0)):
            logits += row.to(tl.int64) * logits_stride
            winner = _kept_winner(
                logits, winner, largest, 1.0 / temp, k, p, least, seed + row, position + row, V, UNUSED_BITS, BLOCK
            )
    tl.store(token_ids + row, winner)


@triton.jit
def _kept_winner(
    logits,
    winner,
    largest,
    inverse,
    k,
    p,
    least,
    seed,
    position,
    V: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    key1, key2 = _noise_keys(tl.load(seed), tl.load(position))
    floor = largest * inverse + tl.log(tl.maximum(least, 1e-38))
    mass_in_top_k = -1.0  # not known yet
    below_top_k = tl.full([], float("-inf"), tl.float32)
    is_searching = True
    while is_searching:
        x = tl.load(logits + winner).to(tl.float32)
        num_above, num_equal, mass_above, mass = _count_above(logits, x, largest, inverse, V, BLOCK)
        is_kept = (num_above < k) & ((x * inverse >= floor) | (least <= 0.0))
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
    """(tokens above limit, tokens at it, mass above it, mass of all); mass is exp((logit - largest) / temperature)."""
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
    """The token with the largest logit / temperature + noise, of those with a logit above limit."""
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
    """The k-th largest logit lies in (below_top_k, in_top_k]: bisect the integers that order as the floats do."""
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
    """An int64 that orders as the float does, neighbours one apart."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNUSED_BITS).to(tl.int64)


@triton.jit
def _noise_keys(seed, position):
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    key1 = _mix(low ^ _mix(position.to(tl.uint32) + 0x9E3779B9, 0), 0)
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


def _nucleus_floor(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest of scaled [S, V] that top_k [S, 1] and then top_p [S, 1] keep; [S]."""
    vocab_size = scaled.shape[1]
    largest = scaled.amax(dim=-1, keepdim=True)
    mass_of_all = (scaled - largest).exp_().sum(dim=-1, keepdim=True)
    keeps_all = (top_k >= vocab_size) & (top_p >= 1)
    width = min(1024, vocab_size)  # a sort of the whole row is ten times slower and seldom needed
    while True:
        ordered = scaled.topk(width, dim=-1).values
        kth_largest = ordered.gather(1, top_k.clamp(max=width).long() - 1)
        mass = (ordered - largest).exp_()
        has_top_k = (top_k <= width) & (ordered[:, -1:] < kth_largest)
        has_top_p = (top_k >= vocab_size) & (mass.sum(dim=-1, keepdim=True) > top_p * mass_of_all)
        if width == vocab_size or bool((has_top_k | has_top_p | keeps_all).all()):
            break
        width = vocab_size
    in_top_k = (ordered >= kth_largest) | (top_k > width)
    mass = mass.masked_fill_(~in_top_k, 0)
    mass_in_top_k = torch.where(top_k >= vocab_size, mass_of_all, mass.sum(dim=-1, keepdim=True))
    in_top_p = in_top_k & ((mass.cumsum(dim=-1) - mass < top_p * mass_in_top_k) | (top_p >= 1))
    in_top_p[:, 0] = True
    floor = ordered.masked_fill_(~in_top_p, torch.inf).amin(dim=-1)
    return torch.where(keeps_all.squeeze(1), -torch.inf, floor)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, fp32 [S, vocab_size], from a hash of (seed, position, token id).

    MurmurHash3's 32-bit finalizer over the token id, keyed by two finalized words of seed and position; int32
    arithmetic wraps as the kernel's uint32 does.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    key1 = _finalize(low ^ _finalize(position.to(torch.int32) + _signed(0x9E3779B9)))
    key2 = _finalize(high ^ _finalize(key1 + _signed(0x7F4A7C15)))
    token_ids = torch.arange(vocab_size, dtype=torch.int32, device=seed.device)
    bits = token_ids * _signed(0x9E3779B9) + key1.unsqueeze(1)
    bits = _finalize(bits, key2.unsqueeze(1))
    uniform = _shift_right(bits, 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=MAX_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _finalize(x: torch.Tensor, key: torch.Tensor | int = 0) -> torch.Tensor:
    x = (x ^ _shift_right(x, 16)) * _signed(0x85EBCA6B)
    x = ((x ^ _shift_right(x, 13)) + key) * _signed(0xC2B2AE35)
    return x ^ _shift_right(x, 16)


def _shift_right(x: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The shift of an unsigned word."""
    return (x >> num_bits) & ((1 << (32 - num_bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """In place on logits [S, V]. counts int16 [R, V]: bit 14 is set for the prompt's tokens, the bits below count how
    often a token was generated; logits row i belongs to counts[rows[i]]. Penalties fp32 [S], as OpenAI and
    Hugging Face define them: repetition divides positive and multiplies negative logits of all tokens seen, then
    frequency is subtracted once a time generated, presence once if generated at all.
    """
    run = apply_penalties_triton if logits.is_cuda else apply_penalties_torch
    run(logits, rows, counts, frequency, presence, repetition)


def apply_penalties_torch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    count = counts.index_select(0, rows)
    values = logits.float()
    factor = repetition.unsqueeze(1)
    values = torch.where(count != 0, torch.where(values > 0, values / factor, values * factor), values)
    times = count & (PROMPT_BIT - 1)
    values -= frequency.unsqueeze(1) * times + presence.unsqueeze(1) * (times > 0)
    logits.copy_(values)


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
        _apply_penalties_kernel[(num_rows, triton.cdiv(vocab_size, PIECE_BLOCK))](
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
    once_a_time = tl.load(frequency + i)
    once = tl.load(presence + i)
    factor = tl.load(repetition + i)
    if (once_a_time != 0.0) | (once != 0.0) | (factor != 1.0):
        token_id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_token = token_id < V
        logits += i.to(tl.int64) * logits_stride + token_id
        counts += tl.load(rows + i).to(tl.int64) * counts_stride + token_id
        count = tl.load(counts, mask=is_token, other=0).to(tl.int32)
        x = tl.load(logits, mask=is_token, other=0.0).to(tl.float32)
        x = tl.where(count != 0, tl.where(x > 0, x / factor, x * factor), x)
        times = count & 0x3FFF
        x -= once_a_time * times.to(tl.float32) + tl.where(times > 0, once, 0.0)
        tl.store(logits, x.to(logits.dtype.element_ty), mask=is_token)


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """-inf, in place on logits [S, V], where a token's bit is 0. bitmask int32 [M, ceil(V / 32)], token 32 w + b is
    bit b of word w; line i belongs to logits row rows[i] (int32 [M]), to row i without `rows`. A negative row is
    skipped, so that a captured graph can have unused lines.
    """
    run = apply_token_bitmask_triton if logits.is_cuda else apply_token_bitmask_torch
    run(logits, bitmask, rows)


def apply_token_bitmask_torch(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_forbidden = ((bitmask.unsqueeze(-1) >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
    if rows is None:
        logits.masked_fill_(is_forbidden, -torch.inf)
    else:
        used = rows >= 0
        logits[rows[used]] = logits[rows[used]].masked_fill(is_forbidden[used], -torch.inf)


def apply_token_bitmask_triton(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    vocab_size = logits.shape[1]
    num_masks = bitmask.shape[0]
    if num_masks:
        _apply_token_bitmask_kernel[(num_masks, triton.cdiv(vocab_size, PIECE_BLOCK))](
            logits,
            bitmask,
            rows,
            logits.stride(0),
            bitmask.stride(0),
            vocab_size,
            BLOCK=PIECE_BLOCK,
            **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
        )


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
        logits += row.to(tl.int64) * logits_stride + token_id
        forbidden = tl.full([BLOCK], float("-inf"), logits.dtype.element_ty)
        tl.store(logits, forbidden, mask=is_forbidden & (token_id < V))


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-softmax of logits [S, V] where it is wanted: (of token_ids [S], the k largest [S, k], their ids int64
    [S, k], of ids [S, M] or None), values fp32."""
    log_normalizer = logsumexp(logits).unsqueeze(1)

    def at(wanted: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, wanted.long()).float() - log_normalizer

    top_values, top_ids = logits.topk(k, dim=-1)
    chosen = at(token_ids.unsqueeze(1)).squeeze(1)
    return chosen, top_values.float() - log_normalizer, top_ids, None if ids is None else at(ids)


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) over V, in fp32; [S, V] -> fp32 [S]."""
    return logsumexp_triton(logits) if logits.is_cuda else logsumexp_torch(logits)


def logsumexp_torch(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().logsumexp(dim=-1)


def logsumexp_triton(logits: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    num_pieces, num_blocks = _cut_row(num_rows, vocab_size)
    of_pieces = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    if num_rows:
        _piece_logsumexp_kernel[(num_rows, num_pieces)](
            logits,
            of_pieces,
            logits.stride(0),
            V=vocab_size,
            NUM_BLOCKS=num_blocks,
            BLOCK=PIECE_BLOCK,
            **launch_options(logits.device, num_warps=PIECE_BLOCK // 256),
        )
    return of_pieces.logsumexp(dim=-1)


@triton.jit
def _piece_logsumexp_kernel(
    logits,
    of_pieces,
    logits_stride,
    V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * NUM_BLOCKS * BLOCK
    # Not -inf: of two such, the difference is no number.
    largest = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(NUM_BLOCKS):
        token_id = start + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * logits_stride + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, x)
        total = total * tl.exp(largest - new_largest) + tl.exp(x - new_largest)
        largest = new_largest
    row_largest = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
    tl.store(of_pieces + row * tl.num_programs(1) + tl.program_id(1), row_largest + tl.log(total))

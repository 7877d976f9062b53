"""From logits to tokens: penalties, grammar masks, argmax, sampling and log-probabilities.

A row's token depends on its own logits, seed and position only: the noise is a hash of (seed, position, token id),
never the state of a generator, so neither the batch it runs in nor a retraction changes it.
"""

import torch

GREEDY_TEMPERATURE = 1e-6
MAX_UNIFORM = 1 - 2.0**-24  # the largest float32 below 1
PROMPT_BIT = 1 << 14  # in `counts`: the token occurs in the prompt; the bits below count how often it was generated


def argmax_torch(logits: torch.Tensor) -> torch.Tensor:
    values, token_ids = logits.max(dim=-1)
    return torch.where(values.isfinite(), token_ids, -1).to(torch.int32)


def argmax_numpy(logits: torch.Tensor) -> torch.Tensor:
    """Run `argmax_torch` of float32 on a CPU, where NumPy looks for indices by vectors and torch does not."""
    token_ids = torch.from_numpy(logits.numpy().argmax(-1))
    values = logits.gather(1, token_ids[:, None])[:, 0]
    return torch.where(values.isfinite(), token_ids, -1).to(torch.int32)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the first largest of each row, [S, V] -> int32 [S]; -1 where a row holds a NaN or inf or only -inf."""
    if logits.is_cuda:
        from kernels.triton_sampling import argmax_triton  # here: a machine without a GPU need not have triton

        return argmax_triton(logits)
    return argmax_numpy(logits) if logits.dtype == torch.float32 else argmax_torch(logits)


def sample_torch(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    if rows is not None:
        temperature, top_k, top_p, min_p, seed = (of_row[rows] for of_row in (temperature, top_k, top_p, min_p, seed))
    vocab_size = logits.shape[-1]
    largest, first_largest = logits.max(dim=-1)
    scaled = logits.float() * temperature.clamp(min=GREEDY_TEMPERATURE).reciprocal().unsqueeze(1)
    floor = scaled.amax(dim=-1) + min_p.log()  # log(0) = -inf keeps all
    if bool(((top_k < vocab_size) | (top_p < 1)).any()):
        floor = torch.maximum(floor, _nucleus_floor(scaled, top_k.unsqueeze(1), top_p.unsqueeze(1)))
    noisy = (scaled + gumbel_noise(seed, position, vocab_size)).masked_fill_(scaled < floor.unsqueeze(1), -torch.inf)
    is_greedy = (temperature < GREEDY_TEMPERATURE) | (top_k == 1)
    token_ids = torch.where(is_greedy, first_largest, noisy.argmax(dim=-1))
    return torch.where(largest.isfinite(), token_ids, -1).to(torch.int32)


def _nucleus_floor(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the smallest of scaled [S, V] that top_k [S, 1] and then top_p [S, 1] keep; [S]."""
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
    """Return standard Gumbel noise, fp32 [S, vocab_size], from a hash of (seed, position, token id).

    MurmurHash3's 32-bit finalizer over the token id, keyed by two finalized words of seed and position; int32
    arithmetic wraps as the kernel's uint32 does.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    key1 = _finalize(low ^ _finalize(high ^ _finalize(position.to(torch.int32) + _signed(0x9E3779B9))))
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
    """Shift x right as an unsigned word."""
    return (x >> num_bits) & ((1 << (32 - num_bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a row, or -1 where a row holds a NaN or inf or nothing but -inf; logits [S, V] -> int32 [S].

    position int32 [S]; temperature, top_p, min_p fp32, top_k int32, seed int64: [S] or, with `rows` (int32 [S]), tables
    of which logits row i takes entry rows[i]. A row with a temperature below 1e-6 or top_k 1 gets its argmax. Else, in
    this order and with ties at a limit all kept: top_k keeps the k most likely tokens; top_p keeps, of those, each
    token that has less than top_p of their mass before it; min_p keeps tokens at least min_p times as likely as the
    likeliest. Of what is kept, one token is drawn by its probability: the largest logit / temperature + Gumbel noise
    wins (Gumbel-max).
    """
    run = sample_torch
    if logits.is_cuda:
        from kernels.triton_sampling import sample_triton as run
    return run(logits, temperature, top_k, top_p, min_p, seed, position, rows)


def apply_penalties_torch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    count = counts.index_select(0, rows)
    frequency, presence, repetition = frequency[rows], presence[rows], repetition[rows]
    values = logits.float()
    factor = repetition.unsqueeze(1)
    values = torch.where(count != 0, torch.where(values > 0, values / factor, values * factor), values)
    times = count & (PROMPT_BIT - 1)
    values -= frequency.unsqueeze(1) * times + presence.unsqueeze(1) * (times > 0)
    logits.copy_(values)


def apply_penalties(
    logits: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """Apply penalties to logits [S, V], in place.

    counts int16 [R, V]: bit 14 is set for the prompt's tokens, the bits below count how often a token was generated;
    logits row i belongs to counts[rows[i]] and to entry rows[i] of the penalties, fp32 [R], as OpenAI and Hugging Face
    define them: repetition divides positive and multiplies negative logits of all tokens seen, then frequency is
    subtracted once a time generated, presence once if generated at all.
    """
    run = apply_penalties_torch
    if logits.is_cuda:
        from kernels.triton_sampling import apply_penalties_triton as run
    run(logits, rows, counts, frequency, presence, repetition)


def apply_token_bitmask_torch(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_forbidden = ((bitmask.unsqueeze(-1) >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
    if rows is None:
        logits.masked_fill_(is_forbidden, -torch.inf)
    else:
        used = rows >= 0
        logits[rows[used]] = logits[rows[used]].masked_fill(is_forbidden[used], -torch.inf)


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Set logits [S, V] to -inf, in place, where a token's bit is 0.

    bitmask int32 [M, ceil(V / 32)], token 32 w + b is bit b of word w; line i belongs to logits row rows[i] (int32
    [M]), to row i without `rows`. A negative row is skipped, so that a captured graph can have unused lines.
    """
    run = apply_token_bitmask_torch
    if logits.is_cuda:
        from kernels.triton_sampling import apply_token_bitmask_triton as run
    run(logits, bitmask, rows)


def logsumexp_torch(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().logsumexp(dim=-1)


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Return log(sum(exp(logits))) over V, in fp32; [S, V] -> fp32 [S]."""
    if logits.is_cuda:
        from kernels.triton_sampling import logsumexp_triton

        return logsumexp_triton(logits)
    return logsumexp_torch(logits)


def likeliest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row [S, V], the largest first, and their ids: (fp32 [S, k], int64 [S, k])."""
    if logits.is_cuda and k:
        from kernels.triton_likeliest import MAX_LIKELIEST, likeliest_triton

        if k <= MAX_LIKELIEST:
            return likeliest_triton(logits, k)
    values, ids = logits.topk(k, dim=-1)
    return values.float(), ids


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the log-softmax of logits [S, V], fp32, where it is wanted.

    (of token_ids [S], the k largest [S, k], their ids int64 [S, k], of ids [S, M] or None).
    """
    log_normalizer = logsumexp(logits).unsqueeze(1)

    def at(wanted: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, wanted.long()).float() - log_normalizer

    top_values, top_ids = likeliest(logits, k)
    chosen = at(token_ids.unsqueeze(1)).squeeze(1)
    return chosen, top_values - log_normalizer, top_ids, None if ids is None else at(ids)

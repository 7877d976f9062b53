"""The few largest of each row in Triton, for log-probabilities: each warp lists a piece's, then a program the row's."""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch, next_power_of_2
from kernels.triton_elementwise import launch_options, wait_for_input

MAX_LIKELIEST = 32
PIECE = 1024  # logits of which one warp finds the largest
ROW_WARPS = 8


def likeliest_triton(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `kernels.sampling.likeliest` does, for k from 1 to MAX_LIKELIEST. A NaN counts as -inf."""
    num_rows, vocab_size = logits.shape
    num_pieces = cdiv(vocab_size, PIECE)
    candidates = torch.empty(num_rows, num_pieces, k, dtype=torch.float32, device=logits.device)
    candidate_ids = torch.empty(num_rows, num_pieces, k, dtype=torch.int32, device=logits.device)
    values = torch.empty(num_rows, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, k, dtype=torch.int64, device=logits.device)
    if num_rows:
        _largest_of_piece_kernel[(num_rows, num_pieces)](
            logits,
            candidates,
            candidate_ids,
            logits.stride(0),
            k,
            V=vocab_size,
            BLOCK=PIECE,
            **launch_options(logits.device, num_warps=1),
        )
        _largest_of_row_kernel[(num_rows,)](
            candidates,
            candidate_ids,
            values,
            ids,
            num_pieces,
            k,
            BLOCK=next_power_of_2(num_pieces * MAX_LIKELIEST),
            **launch_options(logits.device, num_warps=ROW_WARPS),
        )
    return values, ids


@fast_launch
@triton.jit(do_not_specialize=["k"])
def _largest_of_piece_kernel(
    logits, candidates, candidate_ids, logits_stride, k, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Store the k largest of a piece, the largest first; of equal ones the first."""
    wait_for_input(PDL)
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * logits_stride + token_id, mask=token_id < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    first = (row * tl.num_programs(1) + tl.program_id(1)) * k
    for i in range(k):
        largest = tl.max(x, axis=0)
        best = tl.min(tl.where(x == largest, token_id, V - 1), axis=0)
        tl.store(candidates + first + i, largest)
        tl.store(candidate_ids + first + i, best)
        x = tl.where(token_id == best, float("-inf"), x)


@fast_launch
@triton.jit(do_not_specialize=["num_pieces", "k"])
def _largest_of_row_kernel(
    candidates, candidate_ids, values, ids, num_pieces, k, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Store the k largest of the candidates of a row, as above."""
    wait_for_input(PDL)
    row = tl.program_id(0).to(tl.int64)
    num_candidates = num_pieces * k
    place = tl.arange(0, BLOCK)
    x = tl.load(candidates + row * num_candidates + place, mask=place < num_candidates, other=float("-inf"))
    for i in range(k):
        largest = tl.max(x, axis=0)
        best = tl.min(tl.where(x == largest, place, num_candidates - 1), axis=0)
        tl.store(values + row * k + i, largest)
        tl.store(ids + row * k + i, tl.load(candidate_ids + row * num_candidates + best).to(tl.int64))
        x = tl.where(place == best, float("-inf"), x)

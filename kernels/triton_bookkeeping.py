"""The Triton kernels of `bookkeeping`."""

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch
from kernels.triton_elementwise import launch_options, wait_for_input

BLOCK, COPY_BLOCK = 256, 1024


def copy_triton(source: torch.Tensor, target: torch.Tensor) -> None:
    num_numbers = len(source)
    _copy_kernel[(cdiv(num_numbers, COPY_BLOCK),)](source, target, num_numbers, BLOCK=COPY_BLOCK, num_warps=4)


def begin_step_triton(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    token_rows: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_table: torch.Tensor,
    window_slots: torch.Tensor | None = None,
    window_cache_loc: torch.Tensor | None = None,
) -> None:
    num_tokens = input_ids.shape[0]
    _begin_step_kernel[(cdiv(num_tokens, BLOCK),)](
        input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table, window_slots, window_cache_loc,
        num_tokens, slot_table.stride(0), BLOCK=BLOCK,
    )  # fmt: skip


def end_step_triton(
    tokens: torch.Tensor, rows: torch.Tensor, last_tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> None:
    num_samples = tokens.shape[0]
    stride = 0 if counts is None else counts.stride(0)
    options = launch_options(tokens.device, num_warps=4)
    _end_step_kernel[(cdiv(num_samples, BLOCK),)](
        tokens, rows, last_tokens, counts, num_samples, stride, BLOCK=BLOCK, **options
    )


@fast_launch
@triton.jit(do_not_specialize=["num_numbers"])
def _copy_kernel(source, target, num_numbers, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < num_numbers, other=0), mask=i < num_numbers)


@fast_launch
@triton.jit(do_not_specialize=["num_tokens"])
def _begin_step_kernel(
    input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table, window_slots, window_cache_loc,
    num_tokens, table_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    row = tl.load(token_rows + token, mask=mask, other=0)
    input_id = tl.load(input_ids + token, mask=mask, other=0)
    last_token = tl.load(last_tokens + row, mask=mask & (input_id < 0), other=0)
    tl.store(input_ids + token, tl.where(input_id < 0, last_token, input_id), mask=mask)
    position = tl.load(positions + token, mask=mask, other=0)
    slot = tl.load(out_cache_loc + token, mask=mask, other=0)
    tl.store(slot_table + row.to(tl.int64) * table_stride + position, slot, mask=mask)
    if window_slots is not None:
        tl.store(window_slots + slot, tl.load(window_cache_loc + token, mask=mask, other=0), mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["num_samples"])
def _end_step_kernel(
    tokens, rows, last_tokens, counts, num_samples, counts_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_input(PDL)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = sample < num_samples
    row = tl.load(rows + sample, mask=mask, other=0)
    token = tl.maximum(tl.load(tokens + sample, mask=mask, other=0), 0)
    tl.store(last_tokens + row, token, mask=mask)
    if counts is not None:
        counts += row.to(tl.int64) * counts_stride + token
        tl.store(counts, tl.load(counts, mask=mask, other=0) + 1, mask=mask)

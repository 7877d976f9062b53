"""Copies of a step's numbers, and updates of the per-row tables before its first layer and after its sampler."""

import torch

from kernels.launch import only_compiles


def copy_numbers(source: torch.Tensor, target: torch.Tensor) -> None:
    """Enqueue a copy of numbers [N] from pinned memory to a GPU, or back.

    A kernel copies a step's few kilobytes in less time than a copy engine takes to begin, and to be waited for.
    """
    if source.is_cuda or target.is_cuda:
        from kernels.triton_bookkeeping import copy_triton  # here: a machine without a GPU need not have triton

        copy_triton(source, target)
        if not only_compiles():  # else nothing was copied, and what reads it next may be torch's
            return
    target.copy_(source, non_blocking=True)


def begin_step_torch(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    token_rows: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_table: torch.Tensor,
    window_slots: torch.Tensor | None = None,
    window_cache_loc: torch.Tensor | None = None,
) -> None:
    """Fill in the input ids that only the device knows, and enter the step's slots into the table. In place.

    input_ids, positions, out_cache_loc, token_rows: int32 [T]; a negative id stands for the row's last sampled token.
    last_tokens: int32 [num_rows]. slot_table: int32 [num_rows, max_len]. window_slots: int32 [num_slots], to which the
    step's window_cache_loc, int32 [T], is entered likewise.
    """
    torch.where(input_ids < 0, last_tokens[token_rows], input_ids, out=input_ids)
    slot_table[token_rows, positions] = out_cache_loc
    if window_slots is not None:
        window_slots[out_cache_loc] = window_cache_loc


def begin_step(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    token_rows: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_table: torch.Tensor,
    window_slots: torch.Tensor | None = None,
    window_cache_loc: torch.Tensor | None = None,
) -> None:
    """Run `begin_step_torch`, as one kernel on a GPU."""
    if not input_ids.is_cuda:
        begin_step_torch(
            input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table, window_slots, window_cache_loc
        )
        return
    from kernels.triton_bookkeeping import begin_step_triton  # here: a machine without a GPU need not have triton

    begin_step_triton(
        input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table, window_slots, window_cache_loc
    )


def end_step_torch(
    tokens: torch.Tensor, rows: torch.Tensor, last_tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> None:
    """Record each row's sampled token for the next step, and count it in counts, int16 [R, V]. In place.

    tokens, rows: int32 [S]. A failed draw (-1) leaves 0: its request is ended, but a launched step may still read it.
    """
    valid = tokens.clamp(min=0)
    last_tokens[rows] = valid
    if counts is not None:
        counts[rows, valid] += 1


def end_step(
    tokens: torch.Tensor, rows: torch.Tensor, last_tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> None:
    """Run `end_step_torch`, as one kernel on a GPU."""
    if not tokens.is_cuda:
        end_step_torch(tokens, rows, last_tokens, counts)
        return
    from kernels.triton_bookkeeping import end_step_triton

    end_step_triton(tokens, rows, last_tokens, counts)

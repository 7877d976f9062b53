"""What a step does to the per-row tables before its first layer and after its sampler."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have it
    triton = None


def begin_step_torch(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    token_rows: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_table: torch.Tensor,
) -> None:
    """Fill in the input ids that only the device knows, and enter the step's slots into the table. In place.

    input_ids, positions, out_cache_loc, token_rows: int32 [T]; a negative id stands for the row's last sampled token.
    last_tokens: int32 [num_rows]. slot_table: int32 [num_rows, max_len].
    """
    torch.where(input_ids < 0, last_tokens[token_rows], input_ids, out=input_ids)
    slot_table[token_rows, positions] = out_cache_loc


def begin_step(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    token_rows: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_table: torch.Tensor,
) -> None:
    """`begin_step_torch`, as one kernel on a GPU."""
    if not input_ids.is_cuda:
        begin_step_torch(input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table)
        return
    num_tokens = input_ids.shape[0]
    _begin_step_kernel[(triton.cdiv(num_tokens, 256),)](
        input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table,
        num_tokens, slot_table.stride(0), BLOCK=256,
    )  # fmt: skip


def end_step_torch(tokens: torch.Tensor, rows: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """Note each row's sampled token for the next step. In place.

    tokens, rows: int32 [S]. A failed draw (-1) leaves 0: its request is ended, but a launched step may still read it.
    """
    last_tokens[rows] = tokens.clamp(min=0)


def end_step(tokens: torch.Tensor, rows: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """`end_step_torch`, as one kernel on a GPU."""
    if not tokens.is_cuda:
        end_step_torch(tokens, rows, last_tokens)
        return
    num_samples = tokens.shape[0]
    _end_step_kernel[(triton.cdiv(num_samples, 256),)](tokens, rows, last_tokens, num_samples, BLOCK=256)


if triton is not None:

    @triton.jit(do_not_specialize=["num_tokens"])
    def _begin_step_kernel(
        input_ids, positions, out_cache_loc, token_rows, last_tokens, slot_table,
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

    @triton.jit(do_not_specialize=["num_samples"])
    def _end_step_kernel(tokens, rows, last_tokens, num_samples, BLOCK: tl.constexpr):
        sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = sample < num_samples
        row = tl.load(rows + sample, mask=mask, other=0)
        token = tl.load(tokens + sample, mask=mask, other=0)
        tl.store(last_tokens + row, tl.maximum(token, 0), mask=mask)

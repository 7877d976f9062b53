"""One step's tensors, and how a plan becomes them: everything in one pinned copy."""

from dataclasses import dataclass

import numpy as np
import torch

from engine.plan import Plan

NUM_STAGING_BUFFERS = 4  # steps that may be under way when the next is staged, and one to spare


@dataclass(slots=True)
class SharedPrefixes:
    """Groups of decoding requests whose first tokens live in the same slots, so that attention reads them once.

    Request i of the step belongs to at most one group. `members` lists request indices group after group.
    """

    prefix_lens: torch.Tensor  # int32 [G], shared tokens; 0 for an unused group
    cu_members: torch.Tensor  # int32 [G + 1]
    members: torch.Tensor  # int32 [B]
    own_starts: torch.Tensor  # int32 [B], where each request's own part starts: its group's prefix_len, or 0


@dataclass(slots=True)
class ForwardBatch:
    """What one forward reads. T tokens of B requests; the requests with exactly one token come first.

    Device tensors are views of one staging buffer and stay valid until the next step is launched.
    """

    input_ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T], each token's place in its sequence
    out_cache_loc: torch.Tensor  # int32 [T], the slot its key and value go to
    token_rows: torch.Tensor  # int32 [T], the row each token belongs to
    rows: torch.Tensor  # int32 [B], each request's line in slot_table
    seq_lens: torch.Tensor  # int32 [B], tokens its last token may look at, itself included
    cu_q_lens: torch.Tensor  # int32 [B + 1], where each request's tokens start in [T]
    slot_table: torch.Tensor  # int32 [num_rows, max_context], the slot of every token of every row
    num_decodes: int  # requests 0 .. num_decodes have one token each; the rest have more
    max_q_len: int
    max_seq_len: int  # upper bounds, known on the host
    q_lens_host: np.ndarray  # int32 [B]
    seq_lens_host: np.ndarray  # int32 [B]; in a captured graph both are the capture's, not the step's
    shared: SharedPrefixes | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def batch_size(self) -> int:
        return self.rows.shape[0]


class Stager:
    """Turns plans into `ForwardBatch`es. A batch of the same shape always lies at the same device addresses."""

    def __init__(self, max_tokens: int, max_requests: int, slot_table: torch.Tensor) -> None:
        size = 4 * max_tokens + 8 * (max_requests + 1)
        self.slot_table = slot_table
        self.device = slot_table.device
        self._device = torch.zeros(size, dtype=torch.int32, device=self.device)
        pinned = self.device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(NUM_STAGING_BUFFERS)]
        self._turn = 0

    def write(self, plan: Plan, pad_to: int | None = None) -> torch.Tensor:
        """Lay `plan` out in the next pinned buffer; decode-only plans padded to `pad_to` requests of row 0."""
        self._turn = (self._turn + 1) % NUM_STAGING_BUFFERS
        buffer = self._host[self._turn]
        host = buffer.numpy()
        num_requests, num_tokens = len(plan.rows), plan.num_tokens
        size = pad_to or num_requests
        is_padded = size > num_requests
        if plan.is_decode:
            end = 0
            for array in (plan.rows, plan.seq_lens, plan.input_ids, plan.seq_lens - 1, plan.out_cache_loc):
                host[end : end + num_requests] = array
                end += size
            if is_padded:
                table = host[: 5 * size].reshape(5, size)
                table[:, num_requests:] = 0
                table[1, num_requests:] = 1
            host[end : end + size + 1] = np.arange(size + 1)
            end += size + 1
        else:
            cu_q_lens = np.zeros(num_requests + 1, np.int32)
            np.cumsum(plan.q_lens, out=cu_q_lens[1:])
            offsets = (plan.seq_lens - plan.q_lens - cu_q_lens[:-1]).repeat(plan.q_lens)
            positions = np.arange(num_tokens, dtype=np.int32) + offsets
            sample_tokens = cu_q_lens[plan.samples + 1] - 1
            end = 0
            for array in (
                plan.rows, plan.seq_lens, plan.input_ids, positions, plan.out_cache_loc,
                plan.rows.repeat(plan.q_lens), cu_q_lens, sample_tokens,
                plan.rows[plan.samples], plan.seq_lens[plan.samples],
            ):  # fmt: skip
                host[end : end + len(array)] = array
                end += len(array)
        if plan.groups is not None:
            groups = plan.groups
            num_groups = size // 2  # a group has two members at least
            host[end : end + 2 * num_groups + 1 + 2 * size] = 0
            host[end : end + len(groups.prefix_lens)] = groups.prefix_lens
            end += num_groups
            host[end : end + num_groups + 1] = groups.cu_members[-1]
            host[end : end + len(groups.cu_members)] = groups.cu_members
            end += num_groups + 1
            host[end : end + len(groups.members)] = groups.members
            end += size
            host[end : end + len(groups.own_starts)] = groups.own_starts
            end += size
        return buffer[:end]

    def upload(self, staged: torch.Tensor) -> None:
        self._device[: len(staged)].copy_(staged, non_blocking=True)

    def views(
        self, plan: Plan, pad_to: int | None = None
    ) -> tuple[ForwardBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, sample tokens [S], sample rows [S], positions of the sampled tokens [S]) of what `upload` sent."""
        buffer = self._device
        num_requests, num_tokens, num_samples = len(plan.rows), plan.num_tokens, len(plan.samples)
        size = pad_to or num_requests
        if plan.is_decode:
            sizes = [size] * 5 + [size + 1]
            parts = torch.split(buffer[: sum(sizes)], sizes)
            rows, seq_lens, input_ids, positions, out_cache_loc, cu_q_lens = parts
            token_rows = rows
            samples = (cu_q_lens[:num_samples], rows[:num_samples], seq_lens[:num_samples])
        else:
            sizes = [num_requests] * 2 + [num_tokens] * 4 + [num_requests + 1] + [num_samples] * 3
            parts = torch.split(buffer[: sum(sizes)], sizes)
            rows, seq_lens, input_ids, positions, out_cache_loc, token_rows, cu_q_lens = parts[:7]
            samples = (parts[7], parts[8], parts[9])
        shared = None
        if plan.groups is not None:
            start, num_groups = sum(sizes), size // 2
            sizes = [num_groups, num_groups + 1, size, size]
            shared = SharedPrefixes(*torch.split(buffer[start : start + sum(sizes)], sizes))
        batch = ForwardBatch(
            input_ids=input_ids,
            positions=positions,
            out_cache_loc=out_cache_loc,
            token_rows=token_rows,
            rows=rows,
            seq_lens=seq_lens,
            cu_q_lens=cu_q_lens,
            slot_table=self.slot_table,
            num_decodes=size if plan.is_decode else plan.num_decodes,
            max_q_len=int(plan.q_lens.max()),
            max_seq_len=int(plan.seq_lens.max()),
            q_lens_host=plan.q_lens,
            seq_lens_host=plan.seq_lens,
            shared=shared,
        )
        return (batch, *samples)

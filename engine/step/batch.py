"""One step's tensors, and how a plan becomes them: everything in one pinned copy."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine.schedule.plan import Groups, Plan

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
    q_lens_host: np.ndarray  # [B]
    seq_lens_host: np.ndarray  # [B]
    shared: SharedPrefixes | None = None
    is_for_graph: bool = False  # both of the host's are the capture's, not the steps' that replay it


class Shape(NamedTuple):
    """Sizes of a staged step. Where they are rounded up, as for a captured graph, the rest is padding."""

    num_decodes: int
    num_prefills: int
    num_prefill_tokens: int
    num_samples: int
    has_groups: bool

    @property
    def is_decode(self) -> bool:
        """Has each request one token, and is each sampled?"""
        return not self.num_prefills and self.num_samples == self.num_decodes

    @classmethod
    def of(cls, plan: Plan) -> "Shape":
        num_prefills = len(plan.rows) - plan.num_decodes
        return cls(plan.num_decodes, num_prefills, plan.num_prefill_tokens, len(plan.samples), plan.groups is not None)


class StagedBatch(NamedTuple):
    """A step's tensors on the device, and what is sampled: S of its requests."""

    batch: ForwardBatch
    sample_tokens: torch.Tensor  # int32 [S], whose logits are wanted: indices into the T tokens
    sample_rows: torch.Tensor  # int32 [S]
    sample_positions: torch.Tensor  # int32 [S], where each sampled token will stand in its sequence


class Staged(NamedTuple):
    """A plan laid out in pinned memory, and where on the device it goes: int32 [N]."""

    host: torch.Tensor
    device: torch.Tensor


class _Decodes:
    """A step of decodes in a staging buffer, where a later one of the same requests changes little."""

    def __init__(self, plan: Plan, shape: Shape, changing: list[np.ndarray], staged: Staged) -> None:
        self._rows, self._groups, self._shape = plan.rows, plan.groups, shape
        self._changing, self.staged = changing, staged

    def are_of(self, plan: Plan, shape: Shape) -> bool:
        return plan.rows is self._rows and plan.groups is self._groups and shape == self._shape

    def write_next(self, plan: Plan) -> None:
        input_ids, seq_lens, positions, out_cache_loc = self._changing
        input_ids[:] = plan.input_ids
        seq_lens[:] = plan.seq_lens
        np.subtract(plan.seq_lens, 1, out=positions, casting="same_kind")
        out_cache_loc[:] = plan.out_cache_loc


class Stager:
    """Turns plans into batches. A batch of the same shape always lies at the same device addresses."""

    def __init__(self, max_tokens: int, max_requests: int, slot_table: torch.Tensor) -> None:
        size = 4 * max_tokens + 12 * (max_requests + 8)
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.slot_table = slot_table
        self.device = slot_table.device
        self._device = torch.zeros(size, dtype=torch.int32, device=self.device)
        pinned = self.device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(NUM_STAGING_BUFFERS)]
        self._host_arrays = [buffer.numpy() for buffer in self._host]
        self._arange = np.arange(max_tokens + max_requests + 1, dtype=np.int32)
        self._turn = 0
        self._decodes: list[_Decodes | None] = [None] * NUM_STAGING_BUFFERS

    def write(self, plan: Plan, shape: Shape) -> Staged:
        """Lay `plan` out in the next pinned buffer; padding is of row 0, token 0, slot 0, length 0.

        A plan of decodes of which not all are sampled needs a shape that says so.
        """
        turn = self._turn = (self._turn + 1) % NUM_STAGING_BUFFERS
        before = self._decodes[turn]
        if before is not None and before.are_of(plan, shape):
            before.write_next(plan)
            return before.staged
        layout, size = _layout(shape)
        host, staged = self._host_arrays[turn], self._staged(size)
        host[:size] = 0
        (
            rows, seq_lens, cu_q_lens, input_ids, positions, out_cache_loc, token_rows,
            sample_tokens, sample_rows, sample_positions, *groups,
        ) = [host[place] for place in layout]  # fmt: skip
        num_decodes, num_samples = plan.num_decodes, len(plan.samples)

        rows[:num_decodes] = plan.rows[:num_decodes]
        seq_lens[:num_decodes] = plan.seq_lens[:num_decodes]
        input_ids[:num_decodes] = plan.input_ids[:num_decodes]
        positions[:num_decodes] = plan.seq_lens[:num_decodes] - 1
        out_cache_loc[:num_decodes] = plan.out_cache_loc[:num_decodes]
        cu_q_lens[: shape.num_decodes + 1] = self._arange[: shape.num_decodes + 1]
        samples = plan.samples
        if not plan.is_decode:
            first = shape.num_decodes  # request and token at which the prompts start
            last_request, last_token = first + len(plan.rows) - num_decodes, first + plan.num_prefill_tokens
            q_lens, chunk_rows = plan.q_lens[num_decodes:], plan.rows[num_decodes:]
            rows[first:last_request] = chunk_rows
            seq_lens[first:last_request] = plan.seq_lens[num_decodes:]
            ends = cu_q_lens[first + 1 : last_request + 1]
            np.cumsum(q_lens, out=ends)
            ends += first
            cu_q_lens[last_request + 1 :] = last_token
            input_ids[first:last_token] = plan.input_ids[num_decodes:]
            out_cache_loc[first:last_token] = plan.out_cache_loc[num_decodes:]
            token_rows[first:last_token] = chunk_rows.repeat(q_lens)
            offsets = plan.seq_lens[num_decodes:] - ends
            positions[first:last_token] = self._arange[first:last_token] + offsets.repeat(q_lens)
            samples = np.where(samples < num_decodes, samples, samples + (first - num_decodes))
        if not shape.is_decode:
            token_rows[:num_decodes] = plan.rows[:num_decodes]
            sample_tokens[:num_samples] = cu_q_lens[samples + 1] - 1
            sample_rows[:num_samples] = rows[samples]
            sample_positions[:num_samples] = seq_lens[samples]
        if shape.has_groups:
            assert plan.groups is not None
            prefix_lens, cu_members, members, own_starts = groups
            prefix_lens[: len(plan.groups.prefix_lens)] = plan.groups.prefix_lens
            cu_members[:] = plan.groups.cu_members[-1]
            cu_members[: len(plan.groups.cu_members)] = plan.groups.cu_members
            members[: len(plan.groups.members)] = plan.groups.members
            own_starts[: len(plan.groups.own_starts)] = plan.groups.own_starts
        changing = [array[:num_decodes] for array in (input_ids, seq_lens, positions, out_cache_loc)]
        self._decodes[turn] = _Decodes(plan, shape, changing, staged) if shape.is_decode else None
        return staged

    def copy(self, written: np.ndarray) -> Staged:
        """What another rank's `write` wrote, in the next pinned buffer."""
        turn = self._turn = (self._turn + 1) % NUM_STAGING_BUFFERS
        self._decodes[turn] = None
        size = len(written)
        self._host_arrays[turn][:size] = written
        return self._staged(size)

    def _staged(self, size: int) -> Staged:
        """So much of this turn's buffer."""
        return Staged(self._host[self._turn][:size], self._device[:size])

    def upload(self, staged: Staged) -> None:
        staged.device.copy_(staged.host, non_blocking=True)

    def views(self, shape: Shape, plan: Plan, *, is_for_graph: bool = False) -> StagedBatch:
        """What `upload` sends of a plan of that shape. `plan` gives the host's own knowledge of it."""
        layout, _ = _layout(shape)
        rows, seq_lens, cu_q_lens, input_ids, positions, out_cache_loc, token_rows, *samples = (
            self._device[place] for place in layout
        )
        batch = ForwardBatch(
            input_ids=input_ids,
            positions=positions,
            out_cache_loc=out_cache_loc,
            token_rows=token_rows,
            rows=rows,
            seq_lens=seq_lens,
            cu_q_lens=cu_q_lens,
            slot_table=self.slot_table,
            num_decodes=shape.num_decodes,
            q_lens_host=plan.q_lens,
            seq_lens_host=plan.seq_lens,
            shared=SharedPrefixes(*samples[3:]) if shape.has_groups else None,
            is_for_graph=is_for_graph,
        )
        return StagedBatch(batch, *samples[:3])


def plan_of(staged: np.ndarray, shape: Shape, num_samples: int) -> Plan:
    """As much of a plan as its staged form tells, padding included. Arrays are copies."""
    layout, _ = _layout(shape)
    rows, seq_lens, cu_q_lens, input_ids, _, out_cache_loc, *rest = (staged[place].copy() for place in layout)
    return Plan(
        rows=rows,
        q_lens=np.diff(cu_q_lens),
        seq_lens=seq_lens,
        input_ids=input_ids,
        out_cache_loc=out_cache_loc,
        num_decodes=shape.num_decodes,
        samples=np.zeros(num_samples, np.int32),
        epochs=np.zeros(len(rows), np.int64),
        groups=Groups(*rest[4:]) if shape.has_groups else None,
    )


@functools.lru_cache(1024)
def _layout(shape: Shape) -> tuple[list[slice], int]:
    """The place of each array of a staged step, and the end. Starts are aligned to the 16 bytes of a wide load.

    Where tokens, requests and samples are the same, so are the places of what is known of them.
    """
    num_requests = shape.num_decodes + shape.num_prefills
    num_tokens = shape.num_decodes + shape.num_prefill_tokens
    num_groups = max(num_requests // 2, 1)  # a group has two members at least
    of_requests = [num_requests, num_requests, num_requests + 1]
    of_samples = [num_tokens, *[shape.num_samples] * 3]
    of_groups = [num_groups, num_groups + 1, num_requests, num_requests] if shape.has_groups else []
    places, end = [], 0
    for size in [*of_requests, *[num_tokens] * 3, *([] if shape.is_decode else of_samples), *of_groups]:
        places.append(slice(end, end + size))
        end += (size + 3) // 4 * 4
    if shape.is_decode:
        rows, seq_lens, cu_q_lens, *of_tokens = places[:6]
        arange = slice(cu_q_lens.start, cu_q_lens.stop - 1)
        places = [rows, seq_lens, cu_q_lens, *of_tokens, rows, arange, rows, seq_lens, *places[6:]]
    return places, end

"""One step's tensors, and how a plan becomes them: everything in one pinned copy.

Which fields a step has, and where they lie, is engine.step.fields' to say; here they get their values and their names.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from engine.layers.forward_batch import ForwardBatch, SharedPrefixes
from engine.schedule.plan import Groups, Plan
from engine.step.fields import FIELDS, StepShape, layout_of, max_size
from kernels.bookkeeping import copy_numbers

NUM_STAGING_BUFFERS = 4  # steps that may be under way when the next is staged, and one to spare


class StagedBatch(NamedTuple):
    """Hold a step's tensors on the device, and what is sampled: S of its requests."""

    batch: ForwardBatch
    sample_tokens: torch.Tensor  # int32 [S], whose logits are wanted: indices into the T tokens
    sample_rows: torch.Tensor  # int32 [S]
    sample_positions: torch.Tensor  # int32 [S], where each sampled token will stand in its sequence
    feature_tokens: torch.Tensor | None = None  # int32 [F], whose vectors are features: indices into the T tokens
    feature_rows: torch.Tensor | None = None  # int32 [T], see `FeatureRows`


def _fields_of(made: type) -> tuple[str, ...]:
    """Return the names of the step's fields that `made` has attributes for."""
    return tuple(field.name for field in FIELDS if field.name in made.__annotations__)


BATCH_FIELDS, SAMPLE_FIELDS, GROUP_FIELDS = map(_fields_of, (ForwardBatch, StagedBatch, SharedPrefixes))


class Staged(NamedTuple):
    """Hold a plan laid out in pinned memory, and its place on the device: int32 [N]."""

    host: torch.Tensor
    device: torch.Tensor


class _Decodes:
    """Remember a step of decodes in a staging buffer, where the next one of the same cohort changes a few fields."""

    def __init__(self, plan: Plan, shape: StepShape, host: dict[str, np.ndarray], staged: Staged) -> None:
        self._cohort, self._groups, self._shape = plan.cohort, plan.groups, shape
        num_decodes = plan.num_decodes
        self._input_ids = host["input_ids"][:num_decodes]
        self._seq_lens = host["seq_lens"][:num_decodes]
        self._positions = host["positions"][:num_decodes]
        self._out_cache_loc = host["out_cache_loc"][:num_decodes]
        self._window_cache_loc = host["window_cache_loc"][:num_decodes] if shape.has_windows else None
        self._rope = host["rope"][:, :num_decodes] if shape.has_rope else None
        self.staged = staged

    def precede(self, plan: Plan, shape: StepShape) -> bool:
        """Return whether `plan` is a step of the same cohort, groups and shape."""
        return plan.cohort is self._cohort and plan.groups is self._groups and shape == self._shape

    def write_next(self, plan: Plan) -> None:
        self._input_ids[:] = plan.input_ids
        self._seq_lens[:] = plan.seq_lens
        np.subtract(plan.seq_lens, 1, out=self._positions, casting="same_kind")
        self._out_cache_loc[:] = plan.out_cache_loc
        if self._window_cache_loc is not None:
            self._window_cache_loc[:] = plan.window_cache_loc
        if self._rope is not None:
            self._rope[:] = plan.rope


class Stager:
    """Turn plans into batches. A batch of the same shape always lies at the same device addresses."""

    def __init__(self, max_tokens: int, max_requests: int, slot_table: torch.Tensor) -> None:
        size = max_size(max_tokens, 2 * max_requests)  # the steps of a warm-up may have more requests than any plan
        self.max_tokens, self.max_requests = max_tokens, max_requests
        self.slot_table = slot_table
        self.device = slot_table.device
        self._device = torch.zeros(size, dtype=torch.int32, device=self.device)
        pinned = self.device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(NUM_STAGING_BUFFERS)]
        self._host_arrays = [buffer.numpy() for buffer in self._host]
        self._arange = np.arange(max_tokens + max_requests + 1, dtype=np.int32)
        self._current = 0  # of the buffers, the one written last
        self._decodes: list[_Decodes | None] = [None] * NUM_STAGING_BUFFERS

    def write(self, plan: Plan, shape: StepShape) -> Staged:
        """Lay `plan` out in the next pinned buffer. What `shape` has beyond it is padding, zeros.

        A plan of decodes of which not all are sampled needs a shape that says so.
        """
        current = self._current = (self._current + 1) % NUM_STAGING_BUFFERS
        before = self._decodes[current]
        if before is not None and before.precede(plan, shape):
            before.write_next(plan)
            return before.staged
        layout = layout_of(shape)
        self._host_arrays[current][: layout.size] = 0
        host, staged = layout.views(self._host_arrays[current]), self._part(layout.size)
        self._write_decodes(host, plan, shape)
        if not plan.is_decode:
            self._write_chunks(host, plan, shape)
        if not shape.is_decode:
            _write_samples(host, plan, shape)
        if plan.features:
            tokens = _behind_padding(np.concatenate([part.tokens for part in plan.features]), plan, shape)
            if shape.has_feature_rows:
                host["feature_rows"][tokens] = self._arange[1 : len(tokens) + 1]
            else:
                host["feature_tokens"][:] = tokens
        if plan.groups is not None and shape.has_groups:
            _write_groups(host, plan.groups)
        is_repeatable = plan.cohort is not None and shape.is_decode
        self._decodes[current] = _Decodes(plan, shape, host, staged) if is_repeatable else None
        return staged

    def _write_decodes(self, host: dict[str, np.ndarray], plan: Plan, shape: StepShape) -> None:
        """Write the requests with one token, which come first."""
        num_decodes = plan.num_decodes
        host["rows"][:num_decodes] = plan.rows[:num_decodes]
        host["seq_lens"][:num_decodes] = plan.seq_lens[:num_decodes]
        host["input_ids"][:num_decodes] = plan.input_ids[:num_decodes]
        host["positions"][:num_decodes] = plan.seq_lens[:num_decodes] - 1
        host["out_cache_loc"][:num_decodes] = plan.out_cache_loc[:num_decodes]
        if plan.window_cache_loc is not None:
            host["window_cache_loc"][:num_decodes] = plan.window_cache_loc[:num_decodes]
        if plan.rope is not None:
            host["rope"][:, :num_decodes] = plan.rope[:, :num_decodes]
        host["cu_q_lens"][: shape.num_decodes + 1] = self._arange[: shape.num_decodes + 1]
        if not shape.is_decode:  # else these are the rows
            host["token_rows"][:num_decodes] = plan.rows[:num_decodes]

    def _write_chunks(self, host: dict[str, np.ndarray], plan: Plan, shape: StepShape) -> None:
        """Write the requests with several tokens, behind the padding of those with one."""
        num_decodes, first = plan.num_decodes, shape.num_decodes  # first: both of requests and of tokens
        last_request, last_token = first + len(plan.rows) - num_decodes, first + plan.num_prefill_tokens
        q_lens, seq_lens, rows = plan.q_lens[num_decodes:], plan.seq_lens[num_decodes:], plan.rows[num_decodes:]
        host["rows"][first:last_request] = rows
        host["seq_lens"][first:last_request] = seq_lens
        ends = host["cu_q_lens"][first + 1 : last_request + 1]
        np.cumsum(q_lens, out=ends)
        ends += first
        host["cu_q_lens"][last_request + 1 :] = last_token
        host["input_ids"][first:last_token] = plan.input_ids[num_decodes:]
        host["out_cache_loc"][first:last_token] = plan.out_cache_loc[num_decodes:]
        if plan.window_cache_loc is not None:
            host["window_cache_loc"][first:last_token] = plan.window_cache_loc[num_decodes:]
        if plan.rope is not None:
            host["rope"][:, first:last_token] = plan.rope[:, num_decodes:]
        if plan.seen_until is not None:
            host["seen_until"][first:last_token] = plan.seen_until[num_decodes:]
        host["token_rows"][first:last_token] = rows.repeat(q_lens)
        host["positions"][first:last_token] = self._arange[first:last_token] + (seq_lens - ends).repeat(q_lens)

    def copy(self, written: np.ndarray) -> Staged:
        """Lay out in the next pinned buffer what another rank's `write` wrote."""
        current = self._current = (self._current + 1) % NUM_STAGING_BUFFERS
        self._decodes[current] = None
        size = len(written)
        self._host_arrays[current][:size] = written
        return self._part(size)

    def _part(self, size: int) -> Staged:
        """Return the first `size` numbers of the current buffer, and of the device's."""
        return Staged(self._host[self._current][:size], self._device[:size])

    def upload(self, staged: Staged) -> None:
        copy_numbers(staged.host, staged.device)

    def views(self, shape: StepShape, plan: Plan, *, is_for_graph: bool = False) -> StagedBatch:
        """Return the tensors that `upload` fills for a plan of that shape. `plan` has the host's own knowledge."""
        tensors = layout_of(shape).views(self._device)
        batch = ForwardBatch(
            **_pick(BATCH_FIELDS, tensors),
            slot_table=self.slot_table,
            num_decodes=shape.num_decodes,
            q_lens_host=plan.q_lens,
            seq_lens_host=plan.seq_lens,
            shared=SharedPrefixes(**_pick(GROUP_FIELDS, tensors)) if shape.has_groups else None,
            is_for_graph=is_for_graph,
        )
        return StagedBatch(batch, **_pick(SAMPLE_FIELDS, tensors))


def _write_samples(host: dict[str, np.ndarray], plan: Plan, shape: StepShape) -> None:
    """Write whose next tokens are sampled; the fields of requests must have been written."""
    num_samples, samples = len(plan.samples), plan.samples
    if not plan.is_decode:
        samples = _behind_padding(samples, plan, shape)
    host["sample_tokens"][:num_samples] = host["cu_q_lens"][samples + 1] - 1
    host["sample_rows"][:num_samples] = host["rows"][samples]
    host["sample_positions"][:num_samples] = host["seq_lens"][samples]


def _behind_padding(indices: np.ndarray, plan: Plan, shape: StepShape) -> np.ndarray:
    """Return indices of a plan's requests, or its tokens, as `shape` has them: with the decodes' padding in between."""
    return np.where(indices < plan.num_decodes, indices, indices + (shape.num_decodes - plan.num_decodes))


def _write_groups(host: dict[str, np.ndarray], groups: Groups) -> None:
    host["prefix_lens"][: len(groups.prefix_lens)] = groups.prefix_lens
    host["cu_members"][:] = groups.cu_members[-1]  # unused groups are empty
    host["cu_members"][: len(groups.cu_members)] = groups.cu_members
    host["members"][: len(groups.members)] = groups.members
    host["own_starts"][: len(groups.own_starts)] = groups.own_starts


def _pick(names: tuple[str, ...], tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of these names that the step has."""
    return {name: tensors[name] for name in names if name in tensors}


def plan_of(staged: np.ndarray, shape: StepShape, num_samples: int) -> Plan:
    """Return as much of a plan as its staged form says, padding included. Arrays are copies."""
    host = {name: array.copy() for name, array in layout_of(shape).views(staged).items()}
    return Plan(
        rows=host["rows"],
        q_lens=np.diff(host["cu_q_lens"]),
        seq_lens=host["seq_lens"],
        input_ids=host["input_ids"],
        out_cache_loc=host["out_cache_loc"],
        num_decodes=shape.num_decodes,
        samples=np.zeros(num_samples, np.int32),
        epochs=np.zeros(len(host["rows"]), np.int64),
        groups=Groups(**_pick(GROUP_FIELDS, host)) if shape.has_groups else None,
    )

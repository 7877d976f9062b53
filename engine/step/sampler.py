"""From logits to the next tokens: edits, penalties, the draw, log-probabilities.

The host decides which of these a step needs (`SamplingWork`), so that a plain greedy step is one argmax.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.request import TOP_K_ALL
from engine.schedule.plan import Plan
from engine.schedule.rows import Rows
from engine.step.logit_edits import LogitEditor, LogitEdits
from engine.step.logprobs import TokenLogprobs
from kernels import sampling
from kernels.bookkeeping import end_step
from kernels.launch import cdiv

IN_PROMPT = 1 << 14  # bit of a token's count that says it occurs in the prompt; see kernels.sampling.apply_penalties


@dataclass(slots=True)
class SamplingWork:
    """Say what to do to a step's logits [S, V]; S indexes the sampled requests."""

    num_samples: int
    is_greedy: bool
    has_penalties: bool = False
    has_edits: bool = False  # perhaps: see edits
    masked: np.ndarray | None = None  # int64 indices into S whose matchers may forbid tokens
    logprob_samples: np.ndarray | None = None  # int64 indices into S
    num_top_logprobs: int = 0
    logprob_ids: np.ndarray | None = None  # int64 [len(logprob_samples), M], padded with 0
    wants_hidden: bool = False  # somebody asks for hidden states, too
    # The rest may differ from step to step of the same requests; None or empty: nothing to do.
    tables: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # new per-row parameters for the device
    new_counts: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # (row, prompt ids, output ids)
    edits: LogitEdits | None = None
    masks: tuple[torch.Tensor, torch.Tensor] | None = None  # host int32 (bits [M, V / 32], indices into S [M])

    @property
    def is_plain(self) -> bool:
        """Return whether nothing but the most likely token is wanted."""
        return (
            self.is_greedy
            and not self.has_penalties
            and self.edits is None
            and self.logprob_samples is None
            and self.masks is None
        )


class Sampler:
    def __init__(
        self, rows: Rows, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device, backend: str | None
    ) -> None:
        """backend: "pytorch" draws with torch's own operations also on a GPU."""
        self._draw = sampling.sample_torch if backend == "pytorch" else sampling.sample
        size = rows.num_rows + 1
        self.rows, self.vocab_size, self.eos_token_ids, self.device = rows, vocab_size, eos_token_ids, device
        self.last_tokens = torch.zeros(size, dtype=torch.int32, device=device)
        self._floats = torch.zeros(6, size, dtype=torch.float32, device=device)
        self._top_k = torch.full((size,), TOP_K_ALL, dtype=torch.int32, device=device)
        self._seed = torch.zeros(size, dtype=torch.int64, device=device)
        self._counts: torch.Tensor | None = None  # int16 [num_rows + 1, vocab_size], made for the first who needs it
        self._version = -1
        self._editor = LogitEditor(rows, eos_token_ids, vocab_size)
        # The last cohort, and what its steps' work has in common. Never None, as plans' may be.
        self._cohort: object = self
        self._cohort_work = SamplingWork(0, is_greedy=True)

    # ---- on the event loop: what does this plan need? ----

    def plan_work(self, plan: Plan) -> SamplingWork:
        """Decide what the logits of `plan` need. Steps may share the result: nobody writes to it but `masks`."""
        rows, work = self.rows, self._cohort_work
        if plan.cohort is not self._cohort:
            work = self._common_work(plan.rows[plan.samples])
            if plan.cohort is not None:
                self._cohort, self._cohort_work = plan.cohort, work
        has_tables = work.has_penalties or not work.is_greedy
        needs_tables = has_tables and self._version != rows.sampling_version
        if not (needs_tables or work.has_penalties or work.has_edits or work.masked is not None):
            return work
        sampled, work = plan.rows[plan.samples], copy.copy(work)
        if needs_tables:
            self._version = rows.sampling_version
            floats = (
                rows.temperature, rows.top_p, rows.min_p,
                rows.frequency_penalty, rows.presence_penalty, rows.repetition_penalty,
            )  # fmt: skip
            work.tables = (np.stack(floats), rows.top_k.copy(), rows.seed.copy())
        if work.has_penalties:
            work.new_counts = self._new_counts(sampled)
        if work.has_edits:
            work.edits = self._editor.find(sampled, plan.seq_lens[plan.samples])
        return work

    def _common_work(self, sampled: np.ndarray) -> SamplingWork:
        """Return what stays the same of the work for these rows, int64 [S], while they run."""
        rows = self.rows
        work = SamplingWork(len(sampled), np.count_nonzero(rows.is_greedy[sampled]) == len(sampled))
        if not np.count_nonzero(rows.has_extras[sampled]):  # for a few rows much faster than any()
            return work
        work.has_penalties = bool(rows.has_penalties[sampled].any())
        work.has_edits = bool(rows.has_logit_edits[sampled].any())
        work.wants_hidden = bool(rows.wants_hidden[sampled].any())
        if rows.has_mask[sampled].any():
            work.masked = np.flatnonzero(rows.has_mask[sampled])
        if rows.wants_logprobs[sampled].any():
            work.logprob_samples = np.flatnonzero(rows.wants_logprobs[sampled])
            states = rows.states_of(sampled[work.logprob_samples])
            work.num_top_logprobs = max(state.top_logprobs_num for state in states)
            work.logprob_ids = _padded([state.token_ids_logprob for state in states])
        return work

    def _new_counts(self, sampled: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return (row, prompt ids, output ids) of those rows with penalties whose tokens the device has not counted."""
        rows, new = self.rows, []
        for row in sampled[rows.has_penalties[sampled] & ~rows.is_counted[sampled]].tolist():
            rows.is_counted[row] = True
            state = rows.state_at(row)
            assert state.prompt_ids is not None  # without the ids by which the tree knows pictures
            output_ids = rows.token_ids[row, state.prompt_len : rows.num_known[row]]
            new.append((row, state.prompt_ids.astype(np.int64), output_ids.astype(np.int64)))
        return new

    # ---- on the device's stream ----

    def sample(
        self, logits: torch.Tensor, work: SamplingWork, rows: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, TokenLogprobs | None]:
        """Return the next tokens (int32 [S], -1 where logits are not finite) of logits [S, V], which may change.

        rows, positions: int32 [S], whose token it is and where in its sequence it will stand. Log-probabilities are
        the model's own: before edits, penalties and temperature.
        """
        if work.tables is not None:
            for table, values in zip((self._floats, self._top_k, self._seed), work.tables, strict=True):
                table.copy_(torch.from_numpy(values), non_blocking=True)
        raw = None
        if work.logprob_samples is not None:
            raw = logits[self._to_device(work.logprob_samples)]
        if work.has_penalties:
            self._apply_penalties(logits, work, rows)
        if work.edits is not None:
            work.edits.apply(logits)
        if work.masks is not None:
            bits, samples = (part.to(self.device, non_blocking=True) for part in work.masks)
            sampling.apply_token_bitmask(logits, bits, samples)
        if work.is_greedy:
            tokens = sampling.argmax(logits)
        else:
            temperature, top_p, min_p = self._floats[:3]
            tokens = self._draw(logits, temperature, self._top_k, top_p, min_p, self._seed, positions, rows)
        end_step(tokens, rows, self.last_tokens, self._counts if work.has_penalties else None)
        if raw is None:
            return tokens, None
        return tokens, self._logprobs(raw, tokens, work)

    def rehearse(self, max_samples: int) -> None:
        """Run all kernels that logits may need, of as many rows as make a difference to them. Results are arbitrary.

        So no first request that samples waits for a compiler.
        """
        counts = torch.zeros(1, self.vocab_size, dtype=torch.int16, device=self.device)
        bits = torch.zeros(1, cdiv(self.vocab_size, 32), dtype=torch.int32)
        masked = SamplingWork(0, is_greedy=False, masks=(bits, torch.zeros(1, dtype=torch.int32)))
        for num_samples in (1 << i for i in range(max_samples.bit_length())):
            logits = torch.empty(num_samples, self.vocab_size, device=self.device)
            rows = torch.zeros(num_samples, dtype=torch.int32, device=self.device)
            self.sample(logits, SamplingWork(0, is_greedy=True), rows, rows)
            tokens, _ = self.sample(logits, masked, rows, rows)
            sampling.logsumexp(logits)
            for k in (1, 2, 16):  # by which kernels are told apart
                sampling.likeliest(logits, k)
            sampling.apply_penalties(logits, rows, counts, *self._floats[3:])
            end_step(tokens, rows, self.last_tokens, counts)

    def _apply_penalties(self, logits: torch.Tensor, work: SamplingWork, rows: torch.Tensor) -> None:
        if self._counts is None:
            size = (self.rows.num_rows + 1, self.vocab_size)
            self._counts = torch.zeros(size, dtype=torch.int16, device=self.device)
        for row, prompt_ids, output_ids in work.new_counts:
            counts = np.zeros(self.vocab_size, np.int16)
            np.add.at(counts, output_ids, 1)
            counts[prompt_ids] |= IN_PROMPT
            self._counts[row] = torch.from_numpy(counts).to(self.device)
        sampling.apply_penalties(logits, rows, self._counts, *self._floats[3:])

    def _logprobs(self, raw: torch.Tensor, tokens: torch.Tensor, work: SamplingWork) -> TokenLogprobs:
        assert work.logprob_samples is not None
        chosen_ids = tokens[self._to_device(work.logprob_samples)].clamp(min=0)
        ids = None if work.logprob_ids is None else self._to_device(work.logprob_ids)
        return TokenLogprobs(*sampling.logprobs(raw, chosen_ids, work.num_top_logprobs, ids))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _padded(lists: list[list[int]]) -> np.ndarray | None:
    """Return the lists as int64 [len(lists), longest], padded with 0; None if all are empty."""
    longest = max(map(len, lists))
    if not longest:
        return None
    padded = np.zeros((len(lists), longest), np.int64)
    for line, values in zip(padded, lists, strict=True):
        line[: len(values)] = values
    return padded

"""What the scheduler decided for one step: plain arrays, the only thing the runner is told."""

from dataclasses import dataclass, field

import numpy as np

from engine.request import Request


@dataclass(frozen=True, slots=True)
class Groups:
    """Decoding requests that share a cached prefix; arrays as in engine.batch.SharedPrefixes."""

    prefix_lens: np.ndarray
    cu_members: np.ndarray
    members: np.ndarray
    own_starts: np.ndarray


@dataclass(slots=True)
class Plan:
    """One step: B requests, T tokens; requests with one token first. Nobody writes to its arrays."""

    rows: np.ndarray  # int64 [B]
    q_lens: np.ndarray  # int64 [B], tokens to compute
    seq_lens: np.ndarray  # int64 [B], num_computed after the step
    input_ids: np.ndarray  # int32 [T]; -1: the row's last sampled token, still on the device
    out_cache_loc: np.ndarray  # int32 [T]
    num_decodes: int
    samples: np.ndarray  # int64 [S], indices into B of the requests whose next token is sampled
    epochs: np.ndarray  # int64 [B], of the rows when scheduled
    prefix_copies: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # (row, start, cached slots)
    prompt_logprobs: list[tuple[int, Request, int]] = field(default_factory=list)  # (b, request, first position)
    pooled: list[tuple[int, Request, int]] = field(default_factory=list)  # (b, request, first position)
    prefill_only: list[tuple[int, Request]] = field(default_factory=list)  # (b, request) that end with this step
    admitted: list[Request] = field(default_factory=list)  # that run for the first time
    answering: list[Request] = field(default_factory=list)  # whose prompt ends with this step
    groups: Groups | None = None
    num_jumps: int = 0  # requests with several tokens of their answer

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_prefill_tokens(self) -> int:
        return len(self.input_ids) - self.num_decodes

    @property
    def is_decode(self) -> bool:
        return self.num_decodes == len(self.rows)

"""The scheduler's decision for one step: plain arrays, all that the runner gets. And the budget it decides within."""

import bisect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.schedule.cohort import Cohort
from engine.state import RequestState

SIZE_SLACK = 1.03  # times what a step's prompts may take, if they fill a size then
GRAPH_SLACK = 1.25  # times a graph's tokens: a step that could have no more than so many keeps to the graph


@dataclass(frozen=True, slots=True)
class Groups:
    """Hold the decoding requests that share a cached prefix; arrays as in engine.step.batch.SharedPrefixes."""

    prefix_lens: np.ndarray
    cu_members: np.ndarray
    members: np.ndarray
    own_starts: np.ndarray


@dataclass(frozen=True, slots=True)
class FeaturePart:
    """Say which tokens of a step get rows [first, last) of a picture's features as their vectors."""

    tokens: np.ndarray  # int64 [last - first], indices into T
    features: Any
    first: int
    last: int


@dataclass(slots=True)
class Plan:
    """Describe one step: B requests, T tokens; requests with one token first. Nobody writes to its arrays."""

    rows: np.ndarray  # int64 [B]
    q_lens: np.ndarray  # int64 [B], tokens to compute
    seq_lens: np.ndarray  # int64 [B], num_computed after the step
    input_ids: np.ndarray  # int32 [T]; -1: the row's last sampled token, still on the device
    out_cache_loc: np.ndarray  # int32 [T]
    num_decodes: int
    samples: np.ndarray  # int64 [S], indices into B of the requests whose next token is sampled
    epochs: np.ndarray  # int64 [B], of the rows when scheduled
    # Set if the step is this cohort's alone: each computes one token, and one of each is sampled. The same object from
    # step to step while nobody comes or goes.
    cohort: Cohort | None = None
    prefix_copies: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # (row, start, cached slots)
    prompt_logprobs: list[tuple[int, RequestState, int]] = field(default_factory=list)  # (b, state, first position)
    pooled: list[tuple[int, RequestState, int]] = field(default_factory=list)  # (b, state, first position)
    hidden: list[tuple[int, RequestState, int]] = field(default_factory=list)  # likewise, of chunks
    prefill_only: list[tuple[int, RequestState]] = field(default_factory=list)  # (b, state) that end with this step
    admitted: list[RequestState] = field(default_factory=list)  # that run for the first time
    answering: list[RequestState] = field(default_factory=list)  # whose prompt ends with this step
    groups: Groups | None = None
    window_cache_loc: np.ndarray | None = None  # int32 [T], where layers with a window store; None: as all others
    rope: np.ndarray | None = None  # int32 [3, T], positions where rotations have three axes; None: they have one
    seen_until: np.ndarray | None = None  # int32 [T], where what chunks' tokens see ends; None: each with itself
    features: list[FeaturePart] = field(default_factory=list)
    num_jumps: int = 0  # requests with several tokens of their answer
    num_drafts: np.ndarray | None = None  # int64 [S], tokens of each sampled one that are guesses; None: of nobody

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_prefill_tokens(self) -> int:
        return len(self.input_ids) - self.num_decodes

    @property
    def is_decode(self) -> bool:
        return self.num_decodes == len(self.rows)


def context_tokens(seq_lens: np.ndarray, groups: Groups | None) -> int:
    """Return the tokens that attention reads for one token of each of `seq_lens`, shared prefixes left out.

    Those of `groups` are read once per group.
    """
    return int(seq_lens.sum()) - (0 if groups is None else int(groups.own_starts.sum()))


def prefill_work(num_tokens: Any, context: Any, context_cost: float) -> Any:
    """Return the work of chunks of `num_tokens` behind `context` tokens. Numbers or arrays.

    Each token costs 1, and `context_cost` for every one before it.
    """
    return num_tokens * (1 + context_cost * (context + num_tokens / 2))


@dataclass(slots=True)
class PrefillBudget:
    """Limit the prompts of a step; spent chunk by chunk."""

    max_tokens: int
    room: int = sys.maxsize  # tokens that the step can hold at all; max_tokens may be less
    work: float = math.inf  # as of `prefill_work`
    context_cost: float = 0.0
    min_tokens: int = 0  # are granted, whatever work they are: a prompt must not starve
    sizes: Sequence[int] = ()  # ascending, of all chunks together, up to which the device pads others; (): it does not
    num_spent: int = 0
    num_filling: int = 0  # value of num_spent at which a size is filled, and no further one will be; 0: there is none

    @property
    def is_spent(self) -> bool:
        if self.max_tokens <= 0 or self.num_spent == self.num_filling > 0:
            return True
        return self.work <= 0 and self.min_tokens <= 0

    def end(self) -> None:
        """Let the step have no more prompts."""
        self.max_tokens = 0

    def keep_to_graph(self, num_tokens: int) -> None:
        """Take no more than the `num_tokens` of the largest graph, if any, where only a little more could be computed.

        Without a graph the host launches kernels one by one, and meanwhile nobody gets the tokens of the step before.
        """
        if num_tokens and self.work < GRAPH_SLACK * num_tokens:
            self.max_tokens = min(self.max_tokens, num_tokens)

    def num_tokens_behind(self, context: int, num_left: int = sys.maxsize) -> int:
        """Return how long a chunk of a prompt's `num_left` tokens behind `context` may be: one token at least.

        If it is not the last one, it ends where the device need not pad the step, or pads it by little.
        """
        affordable = self._affordable(context)
        if num_left <= affordable:
            return num_left
        index = bisect.bisect_right(self.sizes, SIZE_SLACK * (self.num_spent + affordable))
        self.num_filling = self.sizes[index - 1] if index else 0
        rest = min(self.num_filling - self.num_spent, self.max_tokens)
        if rest < max(self.min_tokens, 1):
            self.num_filling, rest = 0, affordable
        return rest

    def _affordable(self, context: int) -> int:
        if math.isinf(self.work):
            return self.max_tokens
        work, of_first = max(self.work, 0.0), 1 + self.context_cost * context
        affordable = int(2 * work / (of_first + math.sqrt(of_first**2 + 2 * self.context_cost * work)))
        return min(max(affordable, self.min_tokens, 1), self.max_tokens)

    def spend(self, num_tokens: int, context: int) -> None:
        self.num_spent += num_tokens
        self.max_tokens -= num_tokens
        self.room -= num_tokens
        self.min_tokens -= num_tokens
        self.work -= prefill_work(num_tokens, context, self.context_cost)

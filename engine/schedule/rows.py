"""The running requests' state that every step touches, as arrays over rows.

A decode step does vector work over these arrays, so its host cost hardly grows with the batch. Row 0 belongs to no
request: padding of a captured batch reads and writes there.

Row numbers and lengths are int64, numpy's own index type: int32 would be converted at each use as an index, and that
takes longer (1 to 2 us) than the rest of what a small step asks of an array.
"""

import contextlib
import mmap
from typing import cast

import numpy as np

from engine.request import TOP_K_ALL
from engine.state import RequestState


class Rows:
    """Hold tables of `num_rows` requests (row 0 apart) of at most `max_len` tokens each.

    Of a row, tokens [0, num_known) have reached the host; [num_known, num_tokens) are promised by launched steps and
    exist only on the device; [0, num_computed) have (or will have, once those steps ran) their KV in `slots`.
    """

    def __init__(self, num_rows: int, max_len: int) -> None:
        size = num_rows + 1
        self.num_rows, self.max_len = num_rows, max_len
        self.states: list[RequestState | None] = [None] * size
        self.token_ids = _sparse_table(size, max_len)
        self.slots = _sparse_table(size, max_len)

        self.num_known = np.zeros(size, np.int64)
        self.num_tokens = np.zeros(size, np.int64)
        self.num_computed = np.zeros(size, np.int64)
        self.max_tokens = np.zeros(size, np.int64)  # length at which the answer ends
        self.compute_limit = np.zeros(size, np.int64)  # tokens whose KV is ever needed: the last answer token's is not
        self.min_tokens = np.zeros(size, np.int64)  # length below which no stop token may be sampled
        self.rope_delta = np.zeros(size, np.int64)  # of a token behind the prompt: its position, less its index
        self.epoch = np.zeros(size, np.int64)  # how often the row has changed hands

        self.temperature = np.zeros(size, np.float32)
        self.top_p = np.ones(size, np.float32)
        self.min_p = np.zeros(size, np.float32)
        self.top_k = np.full(size, TOP_K_ALL, np.int32)
        self.frequency_penalty = np.zeros(size, np.float32)
        self.presence_penalty = np.zeros(size, np.float32)
        self.repetition_penalty = np.ones(size, np.float32)
        self.seed = np.zeros(size, np.int64)
        self.is_greedy = np.ones(size, bool)
        self.has_stop_text = np.zeros(size, bool)  # strings or regexes
        self.has_penalties = np.zeros(size, bool)
        self.has_logit_edits = np.zeros(size, bool)  # logit_bias or min_new_tokens
        self.stops_at_eos = np.zeros(size, bool)
        self.has_stop_ids = np.zeros(size, bool)
        self.runs_to_limit = np.zeros(size, bool)  # see RequestState.runs_to_limit
        self.wants_tokens = np.zeros(size, bool)  # see RequestState.wants_tokens
        self.wants_logprobs = np.zeros(size, bool)
        self.wants_hidden = np.zeros(size, bool)  # hidden states
        self.has_matcher = np.zeros(size, bool)
        self.has_mask = np.zeros(size, bool)  # its matcher may forbid tokens: sampling waits for it
        self.has_extras = np.zeros(
            size, bool
        )  # a has_ from has_penalties on, or wants more than tokens: most steps have none
        self.is_counted = np.zeros(size, bool)  # the device's counts for penalties follow the row's tokens

        self.sampling_version = 0  # grows when a sampling parameter changes, so that the device's copy is renewed
        self._free = list(range(num_rows, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, state: RequestState) -> int:
        """Fill in a free row for `state`, which has a seed, and return it. There must be one."""
        row = self._free.pop()
        params = state.sampling_params
        tokens = state.all_token_ids()
        self.states[row] = state
        self.token_ids[row, : len(tokens)] = tokens
        self.num_known[row] = self.num_tokens[row] = len(tokens)
        self.num_computed[row] = 0
        assert state.seed is not None
        self.max_tokens[row] = state.prompt_len + state.max_new_tokens
        self.compute_limit[row] = max(state.prompt_len, self.max_tokens[row] - 1)
        self.min_tokens[row] = state.prompt_len + params.min_new_tokens
        self.rope_delta[row] = 0 if state.spans is None else state.spans.rope_delta

        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_p[row], self.min_p[row] = params.top_p or 1.0, params.min_p
        self.top_k[row] = TOP_K_ALL if params.top_k <= 0 else params.top_k
        self.frequency_penalty[row], self.presence_penalty[row] = params.frequency_penalty, params.presence_penalty
        self.repetition_penalty[row] = params.repetition_penalty
        self.seed[row] = state.seed
        self.is_greedy[row] = params.is_greedy
        self.has_penalties[row] = params.has_penalties
        self.has_logit_edits[row] = bool(params.logit_bias or params.min_new_tokens)
        self.stops_at_eos[row] = not params.ignore_eos
        self.has_stop_ids[row] = bool(params.stop_token_ids)
        self.has_stop_text[row] = bool(params.stop or params.stop_regex)
        self.wants_logprobs[row] = state.return_logprob
        self.wants_hidden[row] = state.return_hidden_states
        self.runs_to_limit[row] = state.runs_to_limit
        self.wants_tokens[row] = state.wants_tokens
        self.has_matcher[row] = state.matcher is not None
        self.has_mask[row] = state.matcher is not None and state.matcher.masks
        self.has_extras[row] = (
            self.has_penalties[row] | self.has_logit_edits[row] | self.has_stop_ids[row]
            | self.wants_logprobs[row] | self.wants_hidden[row] | self.has_matcher[row] | self.has_mask[row]
        )  # fmt: skip
        self.is_counted[row] = False
        self.sampling_version += 1
        state.row = row
        return row

    def state_at(self, row: int) -> RequestState:
        """Return the request that runs in `row`. There must be one."""
        state = self.states[row]
        assert state is not None
        return state

    def states_of(self, rows: np.ndarray) -> list[RequestState]:
        """Return the requests that run in `rows`, one in each."""
        return cast("list[RequestState]", list(map(self.states.__getitem__, rows.tolist())))

    def append(self, row: int, tokens: list[int]) -> None:
        """Put known tokens behind the last known one. A token that a step in flight samples there is stale."""
        start = int(self.num_known[row])
        stop = start + len(tokens)
        self.token_ids[row, start:stop] = tokens
        self.num_known[row] = self.num_tokens[row] = stop
        self.is_counted[row] = False

    def output_ids(self, state: RequestState, start: int = 0) -> list[int]:
        """Return the known tokens of an answer, from number `start` on."""
        if (row := state.row) < 0:
            return state.output_ids[start:]
        known: list[int] = self.token_ids[row, state.prompt_len + start : self.num_known[row]].tolist()
        return known

    def cut(self, state: RequestState, num_tokens: int) -> None:
        """Take back the last `num_tokens` of an answer, whose text ended before them."""
        if state.row >= 0:
            self.num_known[state.row] -= num_tokens
        elif num_tokens:
            del state.output_ids[-num_tokens:]
        state.num_forced_tokens -= num_tokens

    def free(self, row: int) -> None:
        """Take the row back, and put the answer's tokens into the request.

        Steps still in flight for it are recognized by its old epoch.
        """
        state = self.states[row]
        assert state is not None
        state.output_ids = self.output_ids(state)
        state.row = -1
        self.states[row] = None
        self.epoch[row] += 1
        self._free.append(row)


def _sparse_table(num_rows: int, num_columns: int) -> np.ndarray:
    """Return int32 zeros, of which only pages written to cost memory.

    Small pages: numpy would ask for huge ones, and the first token of a row would wait 0.2 ms for 2 MB to be cleared.
    """
    memory = mmap.mmap(-1, 4 * num_rows * num_columns, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int32).reshape(num_rows, num_columns)

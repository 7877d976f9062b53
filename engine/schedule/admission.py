"""Room for requests: whether one can ever fit, and whether it fits now beside running ones, whose answers grow."""

import numpy as np

from engine.errors import PromptTooLong
from engine.schedule.decoding import Decoding
from engine.schedule.holdings import Holdings
from engine.schedule.rows import Rows
from engine.schedule.window_holdings import WindowHoldings, row_len
from engine.state import RequestState

MAX_RESERVED_TOKENS = 4096  # of one answer, counted when asking whether a request fits
NUM_DECAY_STEPS = 600  # in which the reserved share of answers falls from its first value to its least


class Admission:
    """Estimate the slots that running requests will need, from their limits and from what became of earlier ones.

    new_token_ratio: the share of an answer's limit that is reserved. It falls step by step, and rises when slots
    have run out.
    """

    def __init__(
        self, rows: Rows, held: Holdings, decoding: Decoding, prefilling: list[RequestState], conservativeness: float
    ) -> None:
        """prefilling: the requests whose prompts are not wholly scheduled, kept up to date by the caller."""
        self._rows, self._held, self._decoding, self._prefilling = rows, held, decoding, prefilling
        first_ratio = min(0.7 * conservativeness, 1.0)
        self._min_ratio = 0.14 * first_ratio
        self._ratio_decay = (first_ratio - self._min_ratio) / NUM_DECAY_STEPS
        self.new_token_ratio = first_ratio

    def check(self, state: RequestState) -> None:
        """Raise `PromptTooLong` if `state` can never fit.

        Sets its max_new_tokens to the room that there is, if the request leaves it open or lets it be shortened.
        """
        params, held = state.sampling_params, self._held
        room = min(self._rows.max_len, held.allocator.num_total - held.page_size + 1) - state.prompt_len
        if params.max_new_tokens is None:
            state.max_new_tokens = max(room, 0)
        elif state.request.may_shorten:
            state.max_new_tokens = min(state.max_new_tokens, max(room, 1))
        if room < max(state.max_new_tokens, params.min_new_tokens, 0) or room < 0:
            raise PromptTooLong(
                f"prompt has {state.prompt_len} tokens and max_new_tokens is {state.max_new_tokens}, "
                f"the limit for both together is {room + state.prompt_len}",
                prompt_len=state.prompt_len,
                answer_len=max(state.max_new_tokens, params.min_new_tokens) if room > 0 else 0,
                limit=room + state.prompt_len,
            )

    def fits(self, state: RequestState, room: int, num_shared: int) -> bool:
        """Decide whether `state` and what runs will probably get by with `room` slots beside those of their tokens.

        num_shared: leading tokens of `state` that others hold too.
        """
        return room >= self._most_growth_with(state) or room >= self._growth_with(state, num_shared)

    def fits_windows(self, state: RequestState, num_whole: int, chunk: int) -> bool:
        """Decide likewise whether the window slots will probably do, if some layers have a pool of those.

        num_whole: leading tokens of `state` that need not be computed. chunk: tokens of a step's prompts at most.
        """
        rows, held, live = self._rows, self._held, self._decoding.rows
        if not isinstance(held, WindowHoldings):
            return True
        of_row = row_len(held.window, held.page_size)  # most that an answer makes a row hold
        guessed = np.minimum(rows.max_tokens[live] - rows.num_tokens[live], MAX_RESERVED_TOKENS) * self.new_token_ratio
        growth = np.where(rows.runs_to_limit[live], rows.max_tokens[live] - rows.num_tokens[live], guessed)
        growth = np.minimum(growth, of_row - (held.num_slots[live] - held.window_starts[live]))
        num_asked = min(state.max_new_tokens - len(state.output_ids), MAX_RESERVED_TOKENS)
        of_prompts = [min(self.new_token_ratio * num, of_row) for num in (
            num_asked, *(int(rows.max_tokens[r.row] - rows.num_known[r.row]) for r in self._prefilling)
        )]  # fmt: skip
        locked = min(num_whole, held.window + held.page_size)
        of_chunks = min(state.num_tokens - num_whole, chunk) + (chunk if self._prefilling else 0)
        room = held.windows.num_free + held.num_window_evictable - locked - of_chunks
        return room >= float(growth.clip(0).sum()) + sum(of_prompts) + held.page_size * (len(live) + 1)

    def on_step(self) -> None:
        """Reserve a little less: a step went well."""
        self.new_token_ratio = max(self._min_ratio, self.new_token_ratio - self._ratio_decay)

    def on_retraction(self) -> None:
        """Reserve what the running answers show to be right, and a little more: slots have run out."""
        rows, live = self._rows, self._decoding.rows
        if not len(live):
            return
        prompt_lens = np.array([state.prompt_len for state in rows.states_of(live)], np.int64)
        max_new = rows.max_tokens[live] - prompt_lens
        used = rows.num_tokens[live] - prompt_lens
        ratio = (float(used.sum()) + 20 * len(live)) / max(float(max_new.sum()), 1.0)
        self.new_token_ratio = min(1.0, max(self.new_token_ratio, ratio))

    def _most_growth_with(self, state: RequestState) -> int:
        """Return the most slots that what runs, and `state` with it, may need beyond those of their tokens so far."""
        rows, held, live = self._rows, self._held, self._decoding.rows
        growth = state.max_new_tokens + int((rows.max_tokens[live] - rows.num_tokens[live]).sum())
        growth += sum(int(rows.max_tokens[r.row] - held.num_slots[r.row]) for r in self._prefilling)
        return growth + held.page_size * (len(live) + len(self._prefilling) + 1)

    def _growth_with(self, state: RequestState, num_shared: int) -> float:
        """Return the slots that they will probably need, likewise.

        num_shared: leading tokens of `state` that others hold too.
        """
        rows, held, live = self._rows, self._held, self._decoding.rows
        is_known = rows.runs_to_limit[live]
        known, others = live[is_known], live[~is_known]
        remaining = rows.max_tokens[known] - rows.num_tokens[known]
        own = rows.num_tokens[known] - held.shared_lens[known]
        guessed = int(np.minimum(rows.max_tokens[others] - rows.num_tokens[others], MAX_RESERVED_TOKENS).sum())
        num_asked = state.max_new_tokens - len(state.output_ids)
        if state.runs_to_limit:
            remaining, own = np.append(remaining, num_asked), np.append(own, state.num_tokens - num_shared)
        else:
            guessed += min(num_asked, MAX_RESERVED_TOKENS)
        unfilled = sum(int(rows.num_tokens[r.row] - held.num_slots[r.row]) for r in self._prefilling)
        # A page each: the last one is not full, and an end is noticed a step late.
        num_pages = len(live) + 1
        return _peak_growth(remaining, own) + guessed * self.new_token_ratio + unfilled + held.page_size * num_pages


def _peak_growth(remaining: np.ndarray, own: np.ndarray) -> int:
    """Return the slots that requests will hold at the worst time beyond those they hold now.

    remaining: [B] tokens to come, one a step; own: [B] tokens whose slots, like those of the ones to come, go free at
    the end. Most is held just before an end, so those are the times to look at (Gong et al. 2025,
    arXiv:2507.10150).
    """
    order = remaining.argsort()
    remaining, own = remaining[order], own[order]
    num_growing = np.arange(len(order), 0, -1)
    given_back = own.cumsum() - own
    return int((remaining * num_growing - given_back).max(initial=0))

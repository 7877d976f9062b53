"""Chunks: known tokens that a step computes for a request, of its prompt or forced by its grammar."""

from dataclasses import dataclass

import numpy as np

from cache.radix import Match
from engine.schedule.decoding import Decoding
from engine.schedule.holdings import Holdings
from engine.schedule.plan import FeaturePart, Plan, PrefillBudget
from engine.schedule.rows import Rows
from engine.state import RequestState


@dataclass(frozen=True, slots=True)
class Chunk:
    """Name known tokens [start, stop) of a request; those of [known, start) are cached, which is news to the device."""

    state: RequestState
    known: int
    start: int
    stop: int
    is_first: bool  # of a request that runs for the first time

    def __len__(self) -> int:
        return self.stop - self.start


class Prompts:
    """Cut prompts into chunks. A request whose last chunk is cut joins the decoding ones."""

    def __init__(self, rows: Rows, held: Holdings, decoding: Decoding) -> None:
        self._rows, self._held, self._decoding = rows, held, decoding
        self.unfinished: list[RequestState] = []  # admitted, prompt not wholly scheduled; oldest first
        self.num_hit_tokens = 0  # prompt tokens found in the cache, of all requests so far

    def next_chunk(self, state: RequestState, budget: PrefillBudget, match: Match | None = None) -> Chunk | None:
        """Cut as much of a prompt as `budget`, which is not spent, allows. None: the pool has no room just now.

        match: what is cached of the prompt, if that has just been looked up.
        """
        rows, held, row = self._rows, self._held, state.row
        num_tokens = int(rows.num_known[row])
        match = match or held.cache.match(rows.token_ids[row, :num_tokens], state.extra_key)
        num_computed = int(rows.num_computed[row])
        start, stop = self._span(state, match, num_computed, num_tokens, budget)
        if state.spans is not None and state.spans.is_whole:
            stop = state.spans.whole_stop(start, stop)
            if stop - start > budget.room:
                return None
        held.adopt(row, match, start)
        if not held.extend(row, start, stop):
            return None
        is_last, is_new_single = stop == num_tokens, stop - start == 1 and stop > held.cached_lens[row]
        if held.is_cached and not (is_last and is_new_single):
            held.publish(row, start, stop, state.extra_key)
        is_first = num_computed == 0 and not state.num_retractions
        if is_first:
            state.num_cached_tokens = min(start, state.prompt_len)
            self.num_hit_tokens += state.num_cached_tokens
        rows.num_computed[row] = stop
        if is_last:
            self.unfinished.remove(state)
            self._decoding.add(row)
        budget.spend(stop - start, start)
        if is_new_single and not is_last:
            budget.end()  # no other request of this step may find it
        return Chunk(state, num_computed, start, stop, is_first)

    def _span(
        self, state: RequestState, match: Match, num_computed: int, num_tokens: int, budget: PrefillBudget
    ) -> tuple[int, int]:
        """Return the tokens of `num_tokens` that come next: [start, stop).

        The last token is computed even when cached, for its logits; so are tokens whose log-probabilities are wanted,
        and all where their states are, or a mean of them. They are written again, the same values, to the slots that
        they have.
        """
        page_size = self._held.page_size
        start = min(max(match.num_whole, num_computed), num_tokens - 1)
        if state.return_hidden_states or state.pooling == "mean":
            start = min(start, num_computed)
        elif state.logprob_start_len >= 0:
            first_wanted = state.logprob_start_len
            if num_computed < first_wanted < start:
                first_wanted = self._held.cache.whole_len(match.node, first_wanted)
            start = min(start, max(num_computed, first_wanted))
        stop = min(start + budget.num_tokens_behind(start, num_tokens - start), num_tokens)
        if stop < num_tokens and stop % page_size:  # only whole pages enter the tree
            stop = max(stop - stop % page_size, start - start % page_size + page_size)
            stop = min(stop, num_tokens)
        return start, stop


def add_chunks(plan: Plan, chunks: list[Chunk], rows: Rows) -> None:
    """Join chunks of prompts and of forced tokens to a plan of decodes; those of one token stand with the decodes."""
    chunks.sort(key=lambda chunk: len(chunk) > 1)
    samples = plan.samples.tolist()
    for b, chunk in enumerate(chunks, start=len(plan.rows)):
        if chunk.stop == rows.num_tokens[chunk.state.row]:
            if chunk.stop < rows.max_tokens[chunk.state.row]:
                samples.append(b)
                if chunk.start < chunk.state.num_tokens:  # not tokens that were forced since
                    plan.answering.append(chunk.state)
            else:
                plan.prefill_only.append((b, chunk.state))
        _note_request(plan, b, chunk, rows)
    parts = [(chunk.state.row, slice(chunk.start, chunk.stop)) for chunk in chunks]
    plan.rows = np.concatenate([plan.rows, np.array([row for row, _ in parts], np.int64)])
    plan.q_lens = np.concatenate([plan.q_lens, np.array([len(chunk) for chunk in chunks], np.int64)])
    plan.seq_lens = np.concatenate([plan.seq_lens, np.array([chunk.stop for chunk in chunks], np.int64)])
    plan.input_ids = np.concatenate([plan.input_ids, *(_input_ids(chunk, rows) for chunk in chunks)])
    plan.out_cache_loc = np.concatenate([plan.out_cache_loc, *(rows.slots[part] for part in parts)])
    plan.num_decodes += sum(len(chunk) == 1 for chunk in chunks)
    plan.samples = np.array(samples, np.int64)
    _add_features(plan, chunks)


def _input_ids(chunk: Chunk, rows: Rows) -> np.ndarray:
    """Return the tokens of a chunk, int32, with none of the ids by which the tree knows pictures."""
    state, start, stop = chunk.state, chunk.start, chunk.stop
    ids = rows.token_ids[state.row, start:stop]
    if state.spans is None or start >= state.prompt_len:
        return ids
    assert state.prompt_ids is not None
    return np.concatenate([state.prompt_ids[start:stop], ids[max(state.prompt_len - start, 0) :]])


def _add_features(plan: Plan, chunks: list[Chunk]) -> None:
    """Note in `plan` which of its tokens are parts of pictures: those of `chunks`, its last ones."""
    first_token = plan.num_tokens - sum(map(len, chunks))
    for chunk in chunks:
        if chunk.state.spans is not None:
            offset = first_token - chunk.start
            for places, features, first, last in chunk.state.spans.parts(chunk.start, chunk.stop):
                plan.features.append(FeaturePart(places + offset, features, first, last))
        first_token += len(chunk)


def _note_request(plan: Plan, b: int, chunk: Chunk, rows: Rows) -> None:
    """Note in `plan` what its request number `b` wants beside tokens, and slots that are news to the device."""
    state, row = chunk.state, chunk.state.row
    if chunk.start > chunk.known:
        plan.prefix_copies.append((row, chunk.known, rows.slots[row, chunk.known : chunk.start].copy()))
    if chunk.is_first:
        plan.admitted.append(state)
    if state.logprob_start_len >= 0 and chunk.start < state.prompt_len - 1:
        plan.prompt_logprobs.append((b, state, chunk.start))
    if state.pooling is not None:
        plan.pooled.append((b, state, chunk.start))
    if state.return_hidden_states:
        plan.hidden.append((b, state, chunk.start))


def seen_until(plan: Plan, chunks: list[Chunk]) -> np.ndarray:
    """Return where what each token sees of its request ends, int32 [T]. chunks: the plan's last requests."""
    found = plan.seq_lens.repeat(plan.q_lens).astype(np.int32)
    first = plan.num_tokens - sum(map(len, chunks))
    for chunk in chunks:
        spans, last = chunk.state.spans, first + len(chunk)
        found[first:last] = np.arange(chunk.start + 1, chunk.stop + 1)
        if spans is not None and spans.is_whole:
            of_prompt = spans.until[chunk.start : chunk.stop]
            found[first : first + len(of_prompt)] = of_prompt
        first = last
    return found


def rope_positions(plan: Plan, chunks: list[Chunk], rows: Rows) -> np.ndarray:
    """Return the positions of a plan's tokens on each of three axes, int32 [3, T]. chunks: its last requests."""
    rope = np.empty((3, plan.num_tokens), np.int32)
    num_before = len(plan.rows) - len(chunks)
    decodes = plan.rows[:num_before]
    rope[:, :num_before] = plan.seq_lens[:num_before] - 1 + rows.rope_delta[decodes]
    first = num_before
    for chunk in chunks:
        spans, last = chunk.state.spans, first + len(chunk)
        span = np.arange(chunk.start, chunk.stop) if spans is None else spans.positions(chunk.start, chunk.stop)
        rope[:, first:last], first = span, last
    return rope

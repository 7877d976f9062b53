"""A step's tokens once they are known: answers grow, grammars move on, requests end."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.schedule.cohort import Cohort
from engine.schedule.decoding import Decoding
from engine.schedule.holdings import Holdings
from engine.schedule.plan import Plan
from engine.schedule.rows import Rows
from engine.state import FinishReason, RequestState, Status
from engine.text.grammar import GrammarError, Matcher

_NO_INDICES = np.empty(0, np.int64)


@dataclass(slots=True)
class Outcome:
    """Report a resolved step to those who wait: new tokens, and requests that ended."""

    states: list[RequestState] = field(default_factory=list)  # that want to see their tokens; again for each token
    token_ids: list[int] = field(default_factory=list)  # each one's newest; of several, the oldest first
    samples: np.ndarray = field(default_factory=lambda: _NO_INDICES)  # each one's index among the samples
    forced: list[tuple[RequestState, list[int]]] = field(default_factory=list)  # tokens that follow from the newest
    watched: list[RequestState] = field(default_factory=list)  # those whose text may end them
    finished: list[RequestState] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class _Runs:
    """Hold new tokens of N running requests, several each: number i has tokens[i, :lens[i]]."""

    rows: np.ndarray  # int64 [N]
    places: np.ndarray  # int64 [N], where the first one stands
    tokens: np.ndarray  # int64 [N, 1 + D]
    lens: np.ndarray  # int64 [N]
    ends: np.ndarray  # bool [N]: the last of these is the answer's last
    samples: np.ndarray  # int64 [N], indices among the samples of the step


class Resolver:
    """Take in sampled tokens: accept those that are not stale, find the ends, move grammars on, finish."""

    def __init__(
        self,
        rows: Rows,
        held: Holdings,
        decoding: Decoding,
        is_eos: np.ndarray,
        finish: Callable[[RequestState, FinishReason], None],
    ) -> None:
        """is_eos: bool [vocab_size]; finish: ends a request, and frees what it holds."""
        self._rows, self._held, self._decoding = rows, held, decoding
        self._is_eos, self._finish = is_eos, finish

    def resolve(self, plan: Plan, tokens: np.ndarray, num_accepted: np.ndarray | None = None) -> Outcome:
        """Take in the tokens that `plan` sampled.

        tokens: int32 [S], -1 where the logits were not finite. Or [S, 1 + D], of a plan with `num_drafts`: then
        num_accepted, int [S] from 1 to 1 + D, says how many of each request's are right.
        """
        if num_accepted is not None:
            return self._resolve_runs(plan, tokens, num_accepted)
        rows, outcome, cohort = self._rows, Outcome(), plan.cohort
        tokens = tokens.astype(np.int64)
        if cohort is not None and cohort is self._decoding.current and not cohort.has_extras:  # nothing can be stale
            these, sampled, places, index = cohort, plan.rows, plan.seq_lens, plan.samples
        else:
            sampled, places = plan.rows[plan.samples], plan.seq_lens[plan.samples]
            is_current = (rows.epoch[sampled] == plan.epochs[plan.samples]) & (rows.num_known[sampled] == places)
            (index,) = is_current.nonzero()
            sampled, tokens, places = sampled[index], tokens[index], places[index]
            these = Cohort(rows, sampled)
        rows.token_ids[sampled, places] = tokens
        rows.num_known[sampled] = lens = places + 1
        outcome.num_tokens = len(sampled)

        ends = lens >= these.max_tokens
        if these.stops_at_eos is not None:
            ends |= self._is_eos[tokens] & these.stops_at_eos
        is_finite = tokens >= 0
        if np.count_nonzero(is_finite) == len(tokens):
            outcome.states, outcome.watched, wanted = these.states, these.watched, these.wanted
        else:
            ends |= ~is_finite
            finite = Cohort(rows, sampled[is_finite])
            outcome.states, outcome.watched = finite.states, finite.watched
            wanted = is_finite.nonzero()[0][finite.wanted]
        is_all = len(wanted) == len(tokens)
        outcome.token_ids = (tokens if is_all else tokens[wanted]).tolist()
        outcome.samples = index if is_all else index[wanted]
        if these.has_extras:
            self._check_stop_ids(sampled, tokens, ends)
            self._advance_grammars(outcome, sampled, tokens, ends)
        if np.count_nonzero(ends):
            self._finish_ended(outcome, sampled[ends], tokens[ends])
        if plan.prefill_only:
            self._finish_prefill_only(outcome, plan)
        return outcome

    # ---- one token each ----

    def _check_stop_ids(self, sampled: np.ndarray, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Mark in `ends` whose token is one of its own stop tokens."""
        for i in np.flatnonzero(self._rows.has_stop_ids[sampled]).tolist():
            ends[i] |= tokens[i] in self._rows.state_at(sampled[i]).sampling_params.stop_token_ids

    def _advance_grammars(self, outcome: Outcome, sampled: np.ndarray, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Move matchers on by their new token, add the tokens that this forces, finish answers that it completes."""
        rows = self._rows
        for i in np.flatnonzero(rows.has_matcher[sampled] & (tokens >= 0)).tolist():
            state, token = rows.state_at(sampled[i]), int(tokens[i])
            if self._is_stop(state, token):
                continue
            forced, end = self._advance(state, token)
            if forced and state.wants_tokens:
                outcome.forced.append((state, forced))
            outcome.num_tokens += len(forced)
            if end is not None:
                ends[i] = False
                self._finish(state, end)
                outcome.finished.append(state)

    def _advance(self, state: RequestState, token: int) -> tuple[list[int], FinishReason | None]:
        """Move the request's matcher on by its newest token.

        Returns the tokens that this forces, now known, and the reason if the answer has come to its end.
        """
        row, matcher = state.row, state.matcher
        assert matcher is not None
        room = int(self._rows.max_tokens[row] - self._rows.num_known[row])
        try:
            matcher.advance(token)
            forced = matcher.jump(room) if matcher.may_jump else []
        except GrammarError as error:
            return [], _grammar_failure(error)
        stop = next((i for i, token in enumerate(forced) if self._is_stop(state, token)), None)
        if stop is not None:
            forced = forced[: stop + 1]
        if forced:
            self._rows.append(row, forced)
            state.num_forced_tokens += len(forced)
        if stop is not None:
            return forced, FinishReason("stop", matched=forced[-1])
        if matcher.is_finished:  # no step is spent on an end-of-sequence token that alone could come
            return forced, FinishReason("stop")
        return forced, FinishReason("length") if len(forced) == room else None

    def _finish_ended(self, outcome: Outcome, sampled: np.ndarray, tokens: np.ndarray) -> None:
        """Finish requests with their last tokens; one of -1 is none, and takes its place back."""
        rows = self._rows
        for row, token in zip(sampled.tolist(), tokens.tolist(), strict=True):
            state = rows.state_at(row)
            if token < 0:
                rows.num_known[row] -= 1
                message = "the model's output is not finite (NaN or inf)"
                if rows.has_mask[row]:
                    message += ", or min_new_tokens forbids all that the grammar allows"
                reason = FinishReason("abort", message=message, status_code=500)
            elif self._is_stop(state, token):
                reason = FinishReason("stop", matched=token)
            else:
                reason = FinishReason("length")
            self._finish(state, reason)
            outcome.finished.append(state)

    def _finish_prefill_only(self, outcome: Outcome, plan: Plan) -> None:
        """Finish requests that wanted no token but their prompt's step."""
        for b, state in plan.prefill_only:
            if state.status is Status.RUNNING and self._rows.epoch[state.row] == plan.epochs[b]:
                self._finish(state, FinishReason("length"))
                outcome.finished.append(state)

    # ---- several tokens each ----

    def _resolve_runs(self, plan: Plan, tokens: np.ndarray, num_accepted: np.ndarray) -> Outcome:
        """Take in the tokens of a step that verified drafts: each request gains a run of them. See `resolve`."""
        rows, outcome = self._rows, Outcome()
        runs = self._accept_runs(plan, tokens.astype(np.int64), num_accepted)
        grammar_ends = self._advance_runs(outcome, runs)
        self._show_runs(outcome, runs)
        for i, reason in grammar_ends.items():
            state = rows.state_at(runs.rows[i])
            self._finish(state, reason)
            outcome.finished.append(state)
        last_tokens = runs.tokens[np.arange(len(runs.lens)), runs.lens - 1]
        self._finish_ended(outcome, runs.rows[runs.ends], last_tokens[runs.ends])
        self._finish_prefill_only(outcome, plan)
        return outcome

    def _accept_runs(self, plan: Plan, tokens: np.ndarray, num_accepted: np.ndarray) -> _Runs:
        """Make known what is accepted, up to each answer's end, and take back what rejected drafts were promised."""
        rows = self._rows
        assert plan.num_drafts is not None
        sampled, places = plan.rows[plan.samples], plan.seq_lens[plan.samples] - plan.num_drafts
        is_current = (rows.epoch[sampled] == plan.epochs[plan.samples]) & (rows.num_known[sampled] == places)
        (index,) = is_current.nonzero()
        sampled, tokens, places = sampled[index], tokens[index], places[index]
        columns = np.arange(tokens.shape[1])
        positions = places[:, None] + columns
        is_end = (tokens < 0) | (positions + 1 >= rows.max_tokens[sampled, None])
        is_end |= self._is_eos[tokens] & rows.stops_at_eos[sampled, None]
        for i in np.flatnonzero(rows.has_stop_ids[sampled]).tolist():
            is_end[i] |= np.isin(tokens[i], rows.state_at(sampled[i]).sampling_params.stop_token_ids)
        is_end &= columns < num_accepted[index, None]
        ends = is_end.any(axis=1)
        lens = np.where(ends, is_end.argmax(axis=1) + 1, num_accepted[index])

        is_in_run = columns < lens[:, None]
        rows.token_ids[sampled.repeat(lens), positions[is_in_run]] = tokens[is_in_run]
        rows.num_known[sampled] = num_known = places + lens
        is_short = lens < 1 + plan.num_drafts[index]
        behind = sampled[is_short]
        rows.num_tokens[behind] = num_known[is_short]
        rows.num_computed[behind] = num_known[is_short] - 1
        for row in behind.tolist():
            self._held.give_back(row, int(rows.num_computed[row]))
        return _Runs(sampled, places, tokens, lens, ends, index)

    def _advance_runs(self, outcome: Outcome, runs: _Runs) -> dict[int, FinishReason]:
        """Move matchers on by their runs; one that comes to an end cuts its run there. Returns the ends, by number."""
        rows, ends = self._rows, {}
        for i in np.flatnonzero(rows.has_matcher[runs.rows]).tolist():
            state = rows.state_at(runs.rows[i])
            *earlier, last = runs.tokens[i, : runs.lens[i]].tolist()
            end = self._advance_quietly(state, earlier)
            if end is not None:
                num_tokens, ends[i] = end
                runs.lens[i] = num_tokens
                rows.num_known[state.row] = runs.places[i] + num_tokens
            elif last >= 0 and not self._is_stop(state, last):
                forced, reason = self._advance(state, last)
                if forced and state.wants_tokens:
                    outcome.forced.append((state, forced))
                outcome.num_tokens += len(forced)
                if reason is not None:
                    ends[i] = reason
        runs.ends[list(ends)] = False
        return ends

    @staticmethod
    def _advance_quietly(state: RequestState, tokens: list[int]) -> tuple[int, FinishReason] | None:
        """Move the matcher on by `tokens`, behind which more is known.

        Returns the number of them that the answer keeps and the reason, if it comes to its end here.
        """
        assert state.matcher is not None
        for num_tokens, token in enumerate(tokens, start=1):
            try:
                state.matcher.advance(token)
            except GrammarError as error:
                return num_tokens, _grammar_failure(error)
            if state.matcher.is_finished:
                return num_tokens, FinishReason("stop")
        return None

    def _show_runs(self, outcome: Outcome, runs: _Runs) -> None:
        """Note the new tokens for those who want to see them; all requests must still be running."""
        rows = self._rows
        is_token = (np.arange(runs.tokens.shape[1]) < runs.lens[:, None]) & (runs.tokens >= 0)
        is_wanted = is_token & rows.wants_tokens[runs.rows, None]
        num_wanted = is_wanted.sum(axis=1)
        outcome.states = rows.states_of(runs.rows.repeat(num_wanted))
        outcome.token_ids = runs.tokens[is_wanted].tolist()
        outcome.samples = runs.samples.repeat(num_wanted)
        outcome.watched = rows.states_of(runs.rows[rows.has_stop_text[runs.rows] & is_token[:, 0]])
        outcome.num_tokens += int(runs.lens.sum())

    # ---- what is known so far ----

    def matchers_of(self, plan: Plan, masked: np.ndarray) -> tuple[list[int], list[Matcher]] | None:
        """Return those of the samples `masked` that are still wanted, and their matchers.

        None if a token before one of them is still on the device.
        """
        rows = self._rows
        b = plan.samples[masked]
        is_alive = rows.epoch[plan.rows[b]] == plan.epochs[b]
        num_unknown = plan.seq_lens[b] - rows.num_known[plan.rows[b]]
        if (num_unknown[is_alive] > 0).any():
            return None
        is_wanted = is_alive & (num_unknown == 0)
        matchers = [rows.state_at(row).matcher for row in plan.rows[b[is_wanted]].tolist()]
        return masked[is_wanted].tolist(), [matcher for matcher in matchers if matcher is not None]

    def _is_stop(self, state: RequestState, token: int) -> bool:
        params = state.sampling_params
        return bool(self._is_eos[token] and not params.ignore_eos) or token in params.stop_token_ids


def _grammar_failure(error: GrammarError) -> FinishReason:
    return FinishReason("abort", message=f"the grammar failed: {error}", status_code=400)

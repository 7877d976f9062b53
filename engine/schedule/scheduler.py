"""The choice of the tokens that the next step computes: no device, no event loop, no clock.

One identity explains it: a step moves each request's `num_computed` towards `num_tokens`. A prompt, a chunk of a
prompt, the next token of an answer are sizes of the same difference. Everything a launched step will do to the
bookkeeping is done when it is scheduled, so the next step can be scheduled before this one has run; only the sampled
tokens themselves arrive later, through `resolve`.

A grammar may leave only one way to go on. Such tokens join the request as known ones when the token before them
arrives (jump-forward), and the next step computes them all. What a step in flight samples at the place of one of them
is dropped: a sampled token whose place is already known is stale.

A chunk of a prompt enters the radix tree when it is scheduled, not when it has run: within a layer, a step stores all
its keys and values before it attends, and steps run in order, so even a request of the same step may read them. But a
step of nothing but single tokens may store and attend in one kernel (`kernels.attention.fits_one_kernel`), so what a
single token stores is read by later steps only: it enters the tree behind those that follow it, or ends its step.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache.allocator import PageAllocator
from cache.radix import NO_SLOTS, Match, RadixCache, RadixStats
from cache.window import WindowSlots
from engine.schedule.admission import Admission
from engine.schedule.decoding import Decoding
from engine.schedule.fairness import FairShares, Queue
from engine.schedule.feature_source import FeatureSource
from engine.schedule.grouping import PrefixGroups
from engine.schedule.holdings import Holdings, shared_node
from engine.schedule.plan import Plan, PrefillBudget, context_tokens
from engine.schedule.policy import QueueOrder
from engine.schedule.prefill import Chunk, Prompts, add_chunks, rope_positions, seen_until
from engine.schedule.resolver import Outcome, Resolver
from engine.schedule.rows import Rows
from engine.schedule.window_holdings import WindowHoldings
from engine.state import FinishReason, RequestState, Status


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    num_running: int
    """Requests with a row."""
    num_waiting: int
    """Requests in the queue."""
    num_waiting_tokens: int
    """Prompt tokens of those that wait."""
    num_total_tokens: int
    """KV slots of the pool."""
    num_free_tokens: int
    """Slots in free pages."""
    num_cached_tokens: int
    """Slots that the tree alone holds: reusable, and evictable at once."""
    num_held_tokens: int
    """Slots in pages of running requests, shared or not; counted by who holds them."""
    num_retractions: int
    """Times that a request lost its slots and was queued again."""
    num_prompt_tokens: int
    """Tokens of the prompts admitted so far."""
    num_hit_tokens: int
    """Those of num_prompt_tokens that were found in the cache."""
    new_token_ratio: float
    """Share of the running answers' limits that is reserved for them."""
    cache: RadixStats
    """The prefix tree's own."""
    num_total_window_tokens: int = 0
    """Slots of the smaller pool, of layers that see a window; 0: there is none, nor anything in the next three."""
    num_free_window_tokens: int = 0
    num_cached_window_tokens: int = 0
    num_held_window_tokens: int = 0

    @property
    def usage(self) -> float:
        """Share of its slots that running requests hold, of the pool that is nearer to its end."""
        full = self.num_held_tokens / self.num_total_tokens
        return max(full, self.num_held_window_tokens / max(self.num_total_window_tokens, 1))


class Scheduler:
    """Admit, plan, retract and end requests; the parts it holds know the rest.

    `held` knows who holds which slots, `decoding` who is past the prompt, `prompts` who is not and how a prompt is
    cut, `admission` who fits, `order` and `shares` who goes next, `groups` who shares a prefix, `resolver` what
    tokens mean.
    """

    def __init__(
        self,
        rows: Rows,
        allocator: PageAllocator,
        cache: RadixCache,
        *,
        is_eos: np.ndarray,  # bool [vocab_size]
        chunked_prefill_size: int,
        windows: WindowSlots | None = None,  # of the layers that see a window, if those have a pool of their own
        policy: str = "lpm",
        conservativeness: float = 1.0,
        max_queued: int | None = None,
        max_queued_tokens: int | None = None,
        seed: int = 0,
        has_rope_axes: bool = False,  # rotations have three axes: plans say where each token stands on them
    ) -> None:
        self.rows = rows
        self._windowed = None if windows is None else WindowHoldings(rows, allocator, cache, windows)
        self.held = self._windowed or Holdings(rows, allocator, cache)
        self.decoding = Decoding(rows, self.held)
        self.prompts = Prompts(rows, self.held, self.decoding)
        self.prefilling = self.prompts.unfinished
        self.admission = Admission(rows, self.held, self.decoding, self.prefilling, conservativeness)
        self._random = random.Random(seed)
        self.order = QueueOrder(policy, self.held, self._random)
        self.shares = FairShares(max_queued, max_queued_tokens)
        self.waiting = Queue(self.shares)
        self.groups = PrefixGroups(self.held)
        self.resolver = Resolver(rows, self.held, self.decoding, is_eos, self.finish)
        self.chunked_prefill_size = self.held.max_chunk(max(chunked_prefill_size, allocator.page_size))
        self.num_retractions = self.num_prompt_tokens = self.num_admitted = 0
        self._num_left = 0  # requests that the last plan left in the queue
        self.feature_source: FeatureSource | None = None  # of a model that reads pictures
        self.parked: dict[str, RequestState] = {}  # by rid: those whose pictures' features are being computed
        self._has_rope_axes = has_rope_axes

    # ---- requests come and go ----

    def submit(self, state: RequestState) -> None:
        """Queue `state`. Raises `PromptTooLong` if it can never fit, `QueueFull` if the queue is full."""
        self.admission.check(state)
        was_left = min(self._num_left, len(self.waiting))  # what has come since runs in the next step, if it has a row
        self.shares.check(state, 0 if was_left or self.parked else self.rows.num_free)
        self.shares.enter(state)
        state.status = Status.WAITING
        state.num_admitted_before = self.num_admitted
        self.waiting.add(state)
        self._has_features(state)

    def resume(self, state: RequestState) -> None:
        """Queue a parked request again: what it waited for has come."""
        del self.parked[state.rid]
        self.waiting.add(state, is_first=bool(state.num_retractions))

    def finish(self, state: RequestState, reason: FinishReason) -> None:
        """End `state` wherever it is. What it computed stays in the cache; the rest of its slots are free at once."""
        if state.status is Status.RUNNING:
            self._release(state, keep=reason.type != "abort")
        elif state.status is Status.WAITING:
            if self.parked.pop(state.rid, None) is None:
                self.waiting.remove(state)
            self.shares.leave(state)
        state.status = Status.FINISHED
        state.finish_reason = reason
        self.shares.settle(state)
        state.spans = None  # its pixels and features: those who remember requests need none

    def flush(self) -> bool:
        """Empty the cache. False, and nothing done, while anything runs or waits."""
        if self.has_work:
            return False
        self.held.drop_cache()
        return True

    def retract_all(self) -> None:
        """Queue all that runs again, to be computed anew."""
        for state in reversed(self.running()):  # the oldest ends up first
            self._retract(state)

    def forget_features(self) -> None:
        """Have all that waits fetch the features of its pictures anew: what makes them has changed."""
        for state in self.waiting:
            if state.spans is not None:
                state.spans.forget()

    def running(self) -> list[RequestState]:
        return [state for row in self.held.nodes if (state := self.rows.states[row]) is not None]

    @property
    def has_work(self) -> bool:
        return bool(self.held.nodes or self.waiting or self.parked)

    @property
    def num_running(self) -> int:
        return len(self.held.nodes)

    @property
    def is_blocked(self) -> bool:
        """Return whether there is something to compute for requests, if there were room or a token came."""
        return bool(self.held.nodes or self.waiting)

    @property
    def num_streams(self) -> int:
        """Requests past their prompt whose tokens somebody wants to see."""
        return len(self.decoding.cohort.wanted)

    @property
    def num_decodes(self) -> int:
        """Requests past their prompt."""
        return len(self.decoding.rows)

    @property
    def num_context_tokens(self) -> int:
        """Tokens that requests past their prompt see, as `engine.schedule.plan.context_tokens` counts them."""
        return context_tokens(self.rows.num_computed[self.decoding.rows], self.groups.groups)

    # ---- deciding a step ----

    def schedule(self, budget: PrefillBudget | None = None) -> Plan | None:
        """Return the next step, or None when nothing can be computed until a launched step resolves.

        budget: of its prompts, if they must do with less than `chunked_prefill_size` leaves them; it is spent.
        """
        rows, decoding = self.rows, self.decoding
        jumps: list[Chunk] = []
        live = decoding.current or decoding.cohort
        decodes = live.rows
        if self._windowed is not None:
            self._windowed.move_on(decodes)
        if len(decodes) and not decoding.count_plain_step():
            num_missing = decoding.num_missing()
            if np.count_nonzero(num_missing == 1) < len(decodes):
                jumping, decodes = decodes[num_missing > 1], decodes[num_missing == 1]
                if len(jumping):
                    jumps = list(self._jump_chunks(jumping))
                    decodes = decodes[np.isin(decodes, decoding.rows)]  # some may have been retracted
        decodes, computed, slots = self._allocate_decodes(decodes)
        cohort = live if len(decodes) == len(live.rows) else None  # None: some wait, jump, or have been retracted
        chunks = jumps
        if self.prefilling or self.waiting:
            room = self.chunked_prefill_size - len(decodes) - sum(map(len, jumps))
            budget = budget or PrefillBudget(room)
            budget.max_tokens, budget.room = min(budget.max_tokens, room), room
            budget.num_spent = sum(map(len, jumps))
            chunks = jumps + list(self._prefill_chunks(budget, may_wait=bool(len(decoding))))
            self._num_left = len(self.waiting)
        if not len(decodes) and not chunks:
            return None
        self.admission.on_step()

        plan = decoding.plan(decodes, computed, slots)
        if chunks:
            add_chunks(plan, chunks, rows)
            plan.num_jumps = sum(len(jump) > 1 for jump in jumps)
        if cohort is not None and not chunks:
            plan.cohort, plan.epochs = cohort, cohort.epochs
            rows.num_tokens[decodes] += 1
        else:
            plan.epochs = rows.epoch[plan.rows]
            rows.num_tokens[plan.rows[plan.samples]] += 1
        plan.groups = self.groups.find(decodes, plan.epochs, cohort)
        if self._windowed is not None:
            plan.window_cache_loc = self._windowed.windows.slots_of(plan.out_cache_loc)
        if self._has_rope_axes or plan.features:
            self._complete(plan, chunks)
        return plan

    def _complete(self, plan: Plan, chunks: list[Chunk]) -> None:
        """Complete the plan of a model that reads pictures. chunks: of the plan's last requests."""
        if self._has_rope_axes:
            plan.rope = rope_positions(plan, chunks, self.rows)
        if any(chunk.state.spans is not None and chunk.state.spans.is_whole for chunk in chunks):
            plan.seen_until = seen_until(plan, chunks)
        for chunk in chunks:
            if chunk.state.spans is not None:
                chunk.state.spans.release(chunk.stop)

    def _jump_chunks(self, jumping: np.ndarray) -> Iterator[Chunk]:
        """Cut forced tokens of `jumping` rows: as many as a step has room for, of each one at least."""
        rows, budget = self.rows, self.chunked_prefill_size - len(self.decoding)
        for row in jumping.tolist():
            state = rows.states[row]
            if state is None:  # retracted for the sake of one before
                continue
            start = int(rows.num_computed[row])
            stop = min(int(rows.num_known[row]), start + max(budget, 1))
            while not self.held.extend(row, start, stop):
                victim = self.prefilling[-1] if self.prefilling else rows.state_at(self.decoding.rows[-1])
                self._retract(victim)
                if victim is state:
                    break
            else:
                rows.num_computed[row] = stop
                budget -= stop - start
                yield Chunk(state, start, start, stop, is_first=False)

    def _allocate_decodes(self, decodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Allocate one slot for each row; the youngest rows are retracted until the rest have theirs.

        Returns the rows, their numbers of computed tokens, and the slots.
        """
        rows, held = self.rows, self.held
        while len(decodes):
            computed = rows.num_computed[decodes]
            slots = held.extend_each(decodes, computed)
            if slots is not None:
                return decodes, computed, slots
            if self.prefilling:  # has produced nothing yet, so loses least
                self._retract(self.prefilling[-1])
            else:
                victim = rows.state_at(decodes[-1])
                decodes = decodes[:-1]
                self._retract(victim)
        return decodes, decodes, NO_SLOTS  # nothing of any

    def _prefill_chunks(self, budget: PrefillBudget, *, may_wait: bool) -> Iterator[Chunk]:
        """Cut chunks of prompts already begun, then of waiting requests that fit, until `budget` is spent.

        may_wait: if the pool is full, slots will come free without our doing.
        """
        index = 0
        while index < len(self.prefilling) and not budget.is_spent:
            state = self.prefilling[index]
            chunk = self.prompts.next_chunk(state, budget)
            if chunk is None:
                if may_wait or len(self.prefilling) == 1:
                    return
                self._retract(self.prefilling[-1])  # half-read prompts hold all slots: the oldest goes on
                continue
            may_wait = True
            index += chunk.stop < self.rows.num_known[state.row]  # a finished prompt has left the list
            yield chunk
        if self.waiting and not budget.is_spent and self.rows.num_free:
            self.order.sort(self.waiting, self.num_admitted)
        while self.waiting and not budget.is_spent and self.rows.num_free:
            state = self.waiting.next()
            if not self._has_features(state):
                continue
            match = self._admit(state)
            if match is None:
                return
            chunk = self.prompts.next_chunk(state, budget, match)
            if chunk is None:
                return
            yield chunk

    def _has_features(self, state: RequestState) -> bool:
        """Return whether what waits has all features that its prompt's steps will read; else it is parked."""
        if state.spans is None:
            return True
        assert self.feature_source is not None
        start = 0  # all is computed, where something of each token is wanted
        if state.logprob_start_len < 0 and not state.return_hidden_states and state.pooling != "mean":
            tokens = state.all_token_ids()
            start = min(self.held.cache.match_len(tokens, state.extra_key), len(tokens) - 1)
        missing = state.spans.missing(start)
        if not missing or self.feature_source.fetch(state, missing):
            return True
        self.waiting.remove(state)
        self.parked[state.rid] = state
        return False

    def _admit(self, state: RequestState) -> Match | None:
        """Let `state` run if its prompt, and probably its answer, fit beside what runs.

        Returns the cached part of its prompt, None if it has to wait.
        """
        tokens, cache = state.all_token_ids(), self.held.cache
        match = cache.match(tokens, state.extra_key)
        cache.lock(match.node)
        num_shared = shared_node(match.node).depth_tokens
        room = self.held.num_available - (len(tokens) - len(match.slots))
        if self.num_running and not (
            self.admission.fits(state, room, num_shared)
            and self.admission.fits_windows(state, match.num_whole, self.chunked_prefill_size)
        ):
            cache.unlock(match.node)
            return None
        if state.seed is None:  # drawn once, so that a retracted request repeats its own choices
            state.seed = self._random.getrandbits(62)
        row = self.rows.allocate(state)
        state.status = Status.RUNNING
        self.held.start(row, match.node, num_shared)
        if not state.num_retractions:
            self.num_prompt_tokens += state.prompt_len
            cache.hit(match.node)  # not at each match: those that wait, or come in chunks, are matched many times
        self.num_admitted += 1
        self.waiting.remove(state)
        self.prefilling.append(state)
        self.shares.admit(state, match.num_whole)
        return match

    # ---- leaving ----

    def _retract(self, state: RequestState) -> None:
        """Take everything back from a running request and queue it again, first."""
        self._release(state, keep=False)
        state.status = Status.WAITING
        state.num_retractions += 1
        self.num_retractions += 1
        self.shares.enter(state)
        self.waiting.add(state, is_first=True)
        self.admission.on_retraction()

    def _release(self, state: RequestState, *, keep: bool) -> None:
        """Free the row and its slots; `keep`: what is computed stays in the cache."""
        row = state.row
        self.held.release(state, keep=keep)
        if state in self.prefilling:
            self.prefilling.remove(state)
        else:
            self.decoding.remove(row)
        self.rows.free(row)

    def fail(self, plan: Plan, reason: FinishReason) -> list[RequestState]:
        """End the requests of a step that raised; everything else that runs is computed anew. Returns the ended."""
        alive = plan.rows[self.rows.epoch[plan.rows] == plan.epochs]
        failed = [state for row in alive.tolist() if (state := self.rows.states[row]) is not None]
        for state in failed:
            self.finish(state, reason)
        self.retract_all()
        self.held.drop_cache()  # it names tokens that the step never stored
        return failed

    def abandon(self, reason: FinishReason) -> list[RequestState]:
        """End what may be the cause after `schedule` itself raised, since nobody knows how far it came.

        Returns the ended requests: all that run, since no slot's owner is certain any more, and without any the first
        in the queue, which would raise again. Pool and cache start afresh; steps still in flight are recognized by
        their epochs.
        """
        ended = self.running()
        for state in ended:
            self.rows.free(state.row)
        if not ended and self.waiting:
            state = self.waiting.next()
            self.waiting.remove(state)
            self.shares.leave(state)
            ended.append(state)
        for state in ended:
            state.status, state.finish_reason = Status.FINISHED, reason
            self.shares.settle(state)
        self.prefilling.clear()
        self.decoding.clear()
        self.held.reset()
        return ended

    # ---- what a step brought, and how it is ----

    def resolve(self, plan: Plan, tokens: np.ndarray, num_accepted: np.ndarray | None = None) -> Outcome:
        """Take in the tokens that `plan` sampled: see `Resolver.resolve`."""
        return self.resolver.resolve(plan, tokens, num_accepted)

    def violations(self) -> list[str]:
        """Return the mistakes in the bookkeeping of slots and rows, [] if there are none. For idle time."""
        found = self.held.violations()
        num_taken = self.rows.num_rows - self.rows.num_free
        if num_taken != self.num_running:
            found.append(f"{num_taken} rows are taken, and {self.num_running} requests run")
        return found

    def check(self) -> None:
        """Raise AssertionError if `violations` or a look at each page and node finds a mistake. Linear: for tests."""
        found = self.violations()
        assert not found, "; ".join(found)
        self.held.check()

    def stats(self) -> SchedulerStats:
        held, windowed = self.held, self._windowed
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=len(self.waiting) + len(self.parked),
            num_waiting_tokens=self.shares.num_waiting_tokens,
            num_total_tokens=held.allocator.num_total,
            num_free_tokens=held.allocator.num_free,
            num_cached_tokens=held.cache.num_evictable,
            num_held_tokens=held.num_held,
            num_retractions=self.num_retractions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_hit_tokens=self.prompts.num_hit_tokens,
            new_token_ratio=self.admission.new_token_ratio,
            cache=held.cache.stats(),
            num_total_window_tokens=0 if windowed is None else windowed.windows.num_total,
            num_free_window_tokens=0 if windowed is None else windowed.windows.num_free,
            num_cached_window_tokens=0 if windowed is None else windowed.num_window_evictable,
            num_held_window_tokens=0 if windowed is None else windowed.num_window_held,
        )

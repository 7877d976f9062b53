"""Which tokens the next step computes. Decides and nothing else: no device, no event loop, no clock.

One identity explains it: a step moves each request's `num_computed` towards `num_tokens`. A prompt, a chunk of a
prompt, the next token of an answer are sizes of the same difference. Everything a launched step will do to the
bookkeeping is done when it is scheduled, so the next step can be scheduled before this one has run; only the sampled
tokens themselves arrive later, through `resolve`.

A grammar may leave only one way to go on. Such tokens join the request as known ones when the token before them
arrives (jump-forward), and the next step computes them all. What a step in flight samples at the place of one of them
is dropped: a sampled token whose place is already known is stale.

A chunk of a prompt enters the radix tree when it is scheduled, not when it has run: within a layer, a step stores all
its keys and values before it attends, and steps run in order, so even a request of the same step may read them.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cache.allocator import PageAllocator
from cache.radix import Match, NoCache, Node, RadixCache
from engine.errors import PromptTooLong
from engine.request import FinishReason, Request, Status
from engine.schedule.fairness import FairShares, Queue
from engine.schedule.plan import Groups, Plan, PrefillBudget, context_tokens
from engine.schedule.rows import Rows, RowSet
from engine.text.grammar import GrammarError, Matcher

MAX_SORTED_QUEUE = 128  # matching a longer queue against the tree costs more than its order gains
MAX_OVERTAKEN = 256  # requests that the policy may admit before one that came earlier
MAX_RESERVED_TOKENS = 4096  # of one answer, counted when asking whether a request fits
MIN_SHARED_TOKENS = 2048  # reads of shared KV a step must save for the grouped attention to pay
_NO_INDICES = np.empty(0, np.int64)


@dataclass(slots=True)
class Outcome:
    """What a resolved step means to those who wait: new tokens, and requests that ended."""

    requests: list[Request] = field(default_factory=list)  # those sampled that want to see their tokens
    token_ids: list[int] = field(default_factory=list)  # of each, its newest
    samples: np.ndarray = field(default_factory=lambda: _NO_INDICES)  # of each, its index among the samples
    forced: list[tuple[Request, list[int]]] = field(default_factory=list)  # tokens that follow from the newest
    watched: list[Request] = field(default_factory=list)  # those whose text may end them
    finished: list[Request] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Prompt tokens of those that wait."""
    num_total_tokens: int
    """KV slots of the pool."""
    num_free_tokens: int
    num_cached_tokens: int
    """Held by the tree alone: reusable, and evictable at once."""
    num_held_tokens: int
    """Held by running requests, shared or not."""
    num_retractions: int
    num_prompt_tokens: int
    """Of all requests admitted so far."""
    num_hit_tokens: int
    """Of those, found in the cache."""
    new_token_ratio: float


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Known tokens [start, stop) of a request; those of [known, start) are cached, which is news to the device."""

    request: Request
    known: int
    start: int
    stop: int
    is_first: bool


class Scheduler:
    def __init__(
        self,
        rows: Rows,
        allocator: PageAllocator,
        cache: RadixCache,
        *,
        is_eos: np.ndarray,  # bool [vocab_size]
        chunked_prefill_size: int,
        policy: str = "lpm",
        conservativeness: float = 1.0,
        max_queued: int | None = None,
        max_queued_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.rows, self.allocator, self.cache = rows, allocator, cache
        self.is_eos = is_eos
        self._is_cached = not isinstance(cache, NoCache)
        self.page_size = allocator.page_size
        self.chunked_prefill_size = max(chunked_prefill_size, self.page_size)
        self.policy = policy
        self.shares = FairShares(max_queued, max_queued_tokens)
        self.waiting = Queue(self.shares)
        self.prefilling: list[Request] = []  # admitted, prompt not wholly scheduled
        self.nodes: dict[int, Node] = {}  # row -> the tree node it locks
        self.cached_lens = np.zeros(rows.num_rows + 1, np.int64)  # row -> leading tokens whose slots the tree owns
        self.shared_lens = np.zeros(rows.num_rows + 1, np.int64)  # row -> those that others held when it was admitted
        self.num_slots = np.zeros(rows.num_rows + 1, np.int64)  # row -> leading tokens that have a slot
        self._decoding = np.empty(0, np.int64)  # rows past their prompt, oldest first; another array when others are
        self._decoding_set: RowSet | None = None  # of exactly these, where a step has asked for it
        self._num_plain_steps = 0  # in which each of these has exactly one token to compute
        # Of decodes only the number differs: plans take as much of these as they need.
        self._one_each = np.ones(rows.num_rows, np.int64)
        self._each = np.arange(rows.num_rows)
        self._unknown = np.full(rows.num_rows, -1, np.int32)
        self._grouped = _NO_INDICES  # rows
        self._grouped_key = (b"", b"")  # theirs and their epochs
        self._groups: Groups | None = None  # of exactly those requests
        self._is_sorted = True
        self._random = random.Random(seed)
        self._base_ratio = min(0.7 * conservativeness, 1.0)
        self._min_ratio = 0.14 * self._base_ratio
        self._ratio_decay = (self._base_ratio - self._min_ratio) / 600
        self.new_token_ratio = self._base_ratio
        self.num_retractions = self.num_prompt_tokens = self.num_hit_tokens = self.num_admitted = 0

    # ---- requests come and go ----

    def submit(self, request: Request) -> None:
        """Queue `request`. Raises if it can never fit, or if the queue is full."""
        params = request.sampling_params
        room = min(self.rows.max_len, self.allocator.num_total - self.page_size + 1) - request.prompt_len
        if params.max_new_tokens is None:
            params.max_new_tokens = max(room, 0)
        if room < max(params.max_new_tokens, params.min_new_tokens, 0) or room < 0:
            raise PromptTooLong(
                f"prompt has {request.prompt_len} tokens and max_new_tokens is {params.max_new_tokens}, "
                f"the limit for both together is {room + request.prompt_len}"
            )
        self.shares.check(request)
        self.shares.enter(request)
        request.status = Status.WAITING
        request.num_admitted_before = self.num_admitted
        self.waiting.add(request)
        self._is_sorted = False

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End `request` wherever it is. What it computed stays in the cache; the rest of its slots are free at once."""
        if request.status is Status.RUNNING:
            self._release(request, keep=reason.type != "abort")
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
            self.shares.leave(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        self.shares.settle(request)

    def flush(self) -> bool:
        """Empty the cache. False, and nothing done, while anything runs or waits."""
        if self.nodes or self.waiting:
            return False
        self.drop_cache()
        return True

    def drop_cache(self) -> None:
        """Forget every prefix. Nothing may be running."""
        self.allocator.free(self.cache.reset())

    def retract_all(self) -> None:
        """Queue all that runs again, to be computed anew."""
        for request in reversed(self.running_requests()):  # the oldest ends up first
            self._retract(request)

    def running_requests(self) -> list[Request]:
        return [request for row in self.nodes if (request := self.rows.requests[row]) is not None]

    @property
    def has_work(self) -> bool:
        return bool(self.nodes or self.waiting)

    @property
    def num_streams(self) -> int:
        return len(self._live.wanted)

    @property
    def num_decodes(self) -> int:
        """Requests past their prompt."""
        return len(self._decoding)

    @property
    def num_context_tokens(self) -> int:
        """Theirs, as of `engine.schedule.plan.context_tokens`."""
        return context_tokens(self.rows.num_computed[self._decoding], self._groups)

    # ---- deciding a step ----

    def schedule(self, budget: PrefillBudget | None = None) -> Plan | None:
        """The next step, or None when nothing can be computed until a launched step resolves.

        budget: of its prompts, if they must do with less than `chunked_prefill_size` leaves them; it is spent.
        """
        rows = self.rows
        jumps: list[_Chunk] = []
        decodes = self._decoding
        if len(decodes) and not self._is_plain_step():
            num_missing = self._num_missing()
            if np.count_nonzero(num_missing == 1) < len(decodes):
                jumping, decodes = decodes[num_missing > 1], decodes[num_missing == 1]
                if len(jumping):
                    jumps = list(self._jump_chunks(jumping))
                    decodes = decodes[np.isin(decodes, self._decoding)]  # some may have been retracted
        decodes, computed, slots = self._allocate_decodes(decodes)
        chunks = jumps
        if self.prefilling or self.waiting:
            room = self.chunked_prefill_size - len(decodes) - sum(jump.stop - jump.start for jump in jumps)
            budget = budget or PrefillBudget(room)
            budget.max_tokens = min(budget.max_tokens, room)
            chunks = jumps + list(self._prefill_chunks(budget, may_wait=bool(len(self._decoding))))
        if not len(decodes) and not chunks:
            return None
        self.new_token_ratio = max(self._min_ratio, self.new_token_ratio - self._ratio_decay)

        plan = self._plan_decodes(decodes, computed, slots)
        if chunks:
            self._add_chunks(plan, chunks)
            plan.num_jumps = sum(jump.stop - jump.start > 1 for jump in jumps)
        is_same = plan.rows is self._decoding
        plan.epochs = self._live.epochs if is_same else rows.epoch[plan.rows]
        plan.groups = self._shared_prefixes(decodes, plan.epochs[: len(decodes)])
        rows.num_tokens[plan.rows if is_same else plan.rows[plan.samples]] += 1
        return plan

    @property
    def _live(self) -> RowSet:
        """Of the rows past their prompt."""
        if self._decoding_set is None:
            rows, live = self.rows, self._decoding
            self._decoding_set = RowSet(rows, live)
            is_plain = len(live) and not self._decoding_set.has_extras
            self._num_plain_steps = int((rows.compute_limit[live] - rows.num_computed[live]).min()) if is_plain else 0
        return self._decoding_set

    def _set_decoding(self, live: np.ndarray) -> None:
        self._decoding, self._decoding_set = live, None

    def _is_plain_step(self) -> bool:
        """Has each decoding row exactly one token to compute, its last one, that need not be known here? Counted down,
        so that a step need not look: forced tokens apart, only an answer's limit ends that.
        """
        if self._live.has_extras or not self._num_plain_steps:  # in this order: `_live` begins the count
            return False
        self._num_plain_steps -= 1
        return True

    def _num_missing(self) -> np.ndarray:
        """Tokens that each decoding row has yet to compute before it can sample."""
        live, rows = self._decoding, self.rows
        return np.minimum(rows.num_tokens[live], rows.compute_limit[live]) - rows.num_computed[live]

    def _jump_chunks(self, jumping: np.ndarray) -> Iterator[_Chunk]:
        """Forced tokens of `jumping` rows: as many as a step has room for, of each one at least."""
        rows, budget = self.rows, self.chunked_prefill_size - len(self._decoding)
        for row in jumping.tolist():
            request = rows.requests[row]
            if request is None:  # retracted for the sake of one before
                continue
            have, start = int(self.num_slots[row]), int(rows.num_computed[row])
            stop = min(int(rows.num_known[row]), start + max(budget, 1))
            while (slots := self._extend(have, int(rows.slots[row, have - 1]), stop - have)) is None:
                victim = self.prefilling[-1] if self.prefilling else _request_of(rows, self._decoding[-1])
                self._retract(victim)
                if victim is request:
                    break
            if slots is None:
                continue
            rows.slots[row, have:stop] = slots
            self.num_slots[row] = rows.num_computed[row] = stop
            budget -= stop - start
            yield _Chunk(request, start, start, stop, is_first=False)

    def _allocate_decodes(self, decodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One slot for each row; the youngest rows are retracted until the rest have theirs.

        Returns the rows, their numbers of computed tokens, and the slots.
        """
        rows = self.rows
        while len(decodes):
            computed = rows.num_computed[decodes]
            last_slots = rows.slots[decodes, computed - 1] if self.page_size > 1 else computed  # then not read
            slots = self.allocator.extend_each(computed, last_slots)
            if slots is None and self._evict(len(decodes) * self.page_size):
                slots = self.allocator.extend_each(computed, last_slots)
            if slots is not None:
                rows.slots[decodes, computed] = slots
                return decodes, computed, slots
            if self.prefilling:  # has produced nothing yet, so loses least
                self._retract(self.prefilling[-1])
            else:
                victim = rows.requests[decodes[-1]]
                assert victim is not None
                decodes = decodes[:-1]
                self._retract(victim)
        return decodes, decodes, self._unknown[:0]  # nothing of any

    def _plan_decodes(self, decodes: np.ndarray, computed: np.ndarray, slots: np.ndarray) -> Plan:
        rows, count = self.rows, len(decodes)
        rows.num_computed[decodes] = self.num_slots[decodes] = seq_lens = computed + 1
        input_ids = self._unknown[:count]
        if self._live.has_extras:  # forced tokens, perhaps, which the device has not sampled
            is_known = computed < rows.num_known[decodes]
            input_ids = np.where(is_known, rows.token_ids[decodes, computed], input_ids)
        return Plan(
            rows=decodes,
            q_lens=self._one_each[:count],
            seq_lens=seq_lens,
            input_ids=input_ids,
            out_cache_loc=slots,
            num_decodes=count,
            samples=self._each[:count],
            epochs=_NO_INDICES,
        )

    def _add_chunks(self, plan: Plan, chunks: list[_Chunk]) -> None:
        """Join chunks of prompts and of forced tokens to the decodes; those of one token stand with the decodes."""
        rows = self.rows
        chunks.sort(key=lambda chunk: chunk.stop - chunk.start > 1)
        first = len(plan.rows)
        samples = plan.samples.tolist()
        for b, chunk in enumerate(chunks, start=first):
            request, row = chunk.request, chunk.request.row
            if chunk.stop == rows.num_tokens[row]:
                if chunk.stop < rows.max_tokens[row]:
                    samples.append(b)
                    if chunk.start < request.num_tokens:  # not tokens that were forced since
                        plan.answering.append(request)
                else:
                    plan.prefill_only.append((b, request))
            if chunk.start > chunk.known:
                plan.prefix_copies.append((row, chunk.known, rows.slots[row, chunk.known : chunk.start].copy()))
            if chunk.is_first:
                plan.admitted.append(request)
            if request.logprob_start_len >= 0 and chunk.start < request.prompt_len - 1:
                plan.prompt_logprobs.append((b, request, chunk.start))
            if request.pooling is not None:
                plan.pooled.append((b, request, chunk.start))
        plan.rows = np.concatenate([plan.rows, np.array([c.request.row for c in chunks], np.int64)])
        plan.q_lens = np.concatenate([plan.q_lens, np.array([c.stop - c.start for c in chunks], np.int64)])
        plan.seq_lens = np.concatenate([plan.seq_lens, np.array([c.stop for c in chunks], np.int64)])
        plan.input_ids = np.concatenate(
            [plan.input_ids, *(rows.token_ids[c.request.row, c.start : c.stop] for c in chunks)]
        )
        plan.out_cache_loc = np.concatenate(
            [plan.out_cache_loc, *(rows.slots[c.request.row, c.start : c.stop] for c in chunks)]
        )
        plan.num_decodes += sum(c.stop - c.start == 1 for c in chunks)
        plan.samples = np.array(samples, np.int64)

    def _prefill_chunks(self, budget: PrefillBudget, *, may_wait: bool) -> Iterator[_Chunk]:
        """Chunks of prompts already begun, then of waiting requests that fit, until `budget` is spent.

        may_wait: if the pool is full, slots will come free without our doing.
        """
        index = 0
        while index < len(self.prefilling) and not budget.is_spent:
            request = self.prefilling[index]
            chunk = self._next_chunk(request, budget)
            if chunk is None:
                if may_wait or len(self.prefilling) == 1:
                    return
                self._retract(self.prefilling[-1])  # half-read prompts hold all slots: the oldest goes on
                continue
            may_wait = True
            index += chunk.stop < self.rows.num_known[request.row]  # a finished prompt has left the list
            yield chunk
        if self.waiting and not budget.is_spent and self.rows.num_free:
            self._sort_waiting()
        while self.waiting and not budget.is_spent and self.rows.num_free:
            request = self.waiting.next()
            match = self._admit(request)
            if match is None:
                return
            chunk = self._next_chunk(request, budget, match)
            if chunk is None:
                return
            yield chunk

    def _admit(self, request: Request) -> Match | None:
        """Give `request` a row if its prompt, and probably its answer, fit beside what runs. Returns what is cached of
        its prompt, None if it has to wait.
        """
        tokens = request.all_token_ids()
        match = self.cache.match(tokens, request.extra_key)
        self.cache.lock(match.node)
        num_shared = _shared_node(match.node).depth_tokens
        room = self.allocator.num_free + self.cache.num_evictable - (len(tokens) - len(match.slots))
        if self.nodes and room < self._most_growth_with(request) and room < self._growth_with(request, num_shared):
            self.cache.unlock(match.node)
            return None
        row = self.rows.allocate(request, self._seed_of(request))
        request.status = Status.RUNNING
        self.nodes[row] = match.node
        self.shared_lens[row] = num_shared
        self.cached_lens[row] = self.num_slots[row] = 0  # the first chunk takes the prefix over
        if not request.num_retractions:
            self.num_prompt_tokens += request.prompt_len
            self.cache.hit(match.node)  # not at each match: those that wait, or come in chunks, are matched many times
        self.num_admitted += 1
        self.waiting.remove(request)
        self.prefilling.append(request)
        self.shares.admit(request, len(match.slots))
        return match

    def _most_growth_with(self, request: Request) -> int:
        """The most slots that what runs, and `request` with it, may need beyond those of their tokens so far."""
        rows, live = self.rows, self._decoding
        assert request.sampling_params.max_new_tokens is not None
        growth = request.sampling_params.max_new_tokens + int((rows.max_tokens[live] - rows.num_tokens[live]).sum())
        growth += sum(int(rows.max_tokens[r.row] - self.num_slots[r.row]) for r in self.prefilling)
        return growth + self.page_size * (len(live) + len(self.prefilling) + 1)

    def _growth_with(self, request: Request, num_shared: int) -> float:
        """Slots that what runs, and `request` with it, will probably need beyond those of their tokens so far.

        num_shared: leading tokens of `request` that others hold too.
        """
        rows, live = self.rows, self._decoding
        is_known = rows.runs_to_limit[live]
        known, others = live[is_known], live[~is_known]
        remaining = rows.max_tokens[known] - rows.num_tokens[known]
        own = rows.num_tokens[known] - self.shared_lens[known]
        guessed = int(np.minimum(rows.max_tokens[others] - rows.num_tokens[others], MAX_RESERVED_TOKENS).sum())
        assert request.sampling_params.max_new_tokens is not None
        num_asked = request.sampling_params.max_new_tokens - len(request.output_ids)
        if request.runs_to_limit:
            remaining, own = np.append(remaining, num_asked), np.append(own, request.num_tokens - num_shared)
        else:
            guessed += min(num_asked, MAX_RESERVED_TOKENS)
        unfilled = sum(int(rows.num_tokens[r.row] - self.num_slots[r.row]) for r in self.prefilling)
        # A page each: the last one is not full, and an end is noticed a step late.
        return (
            _peak_growth(remaining, own) + guessed * self.new_token_ratio + unfilled + self.page_size * (len(live) + 1)
        )

    def _next_chunk(self, request: Request, budget: PrefillBudget, match: Match | None = None) -> _Chunk | None:
        """As much of a prompt as `budget`, which is not spent, allows; None if the pool has no room just now.

        match: what is cached of the prompt, if that has just been looked up.
        """
        rows, row = self.rows, request.row
        num_tokens = int(rows.num_known[row])
        tokens = rows.token_ids[row, :num_tokens]
        match = match or self.cache.match(tokens, request.extra_key)
        num_cached = len(match.slots)
        had_cached = int(self.cached_lens[row])
        if num_cached > had_cached:
            self._lock(row, match.node)
            rows.slots[row, had_cached:num_cached] = match.slots[had_cached:]
            self.cached_lens[row] = num_cached
            self.num_slots[row] = max(num_cached, int(self.num_slots[row]))
        # The last token is computed even when cached, for its logits; so are tokens whose log-probabilities are
        # wanted, and all for a mean of their states. They are written again, the same values, to the slots they have.
        num_computed = int(rows.num_computed[row])
        start = min(max(num_cached, num_computed), num_tokens - 1)
        if request.logprob_start_len >= 0 or request.pooling == "mean":
            start = min(start, max(num_computed, request.logprob_start_len))
        stop = min(start + budget.num_tokens_behind(start), num_tokens)
        if stop < num_tokens and stop % self.page_size:  # only whole pages enter the tree
            stop = max(stop - stop % self.page_size, start - start % self.page_size + self.page_size)
            stop = min(stop, num_tokens)
        have = int(self.num_slots[row])
        if stop > have:
            last_slot = int(rows.slots[row, have - 1]) if have else 0
            slots = self._extend(have, last_slot, stop - have)
            if slots is None:
                return None
            rows.slots[row, have:stop] = slots
            self.num_slots[row] = stop
        if self._is_cached and stop > num_cached:
            _, node = self.cache.insert(tokens[:stop], rows.slots[row, :stop], request.extra_key)
            self._lock(row, node)
            self.cached_lens[row] = stop - stop % self.page_size
        is_first = num_computed == 0 and not request.num_retractions
        if is_first:
            request.num_cached_tokens = min(start, request.prompt_len)
            self.num_hit_tokens += request.num_cached_tokens
        rows.num_computed[row] = stop
        if stop == num_tokens:
            self.prefilling.remove(request)
            self._set_decoding(np.append(self._decoding, row))
        budget.spend(stop - start, start)
        return _Chunk(request, num_computed, start, stop, is_first)

    def _extend(self, have: int, last_slot: int, count: int) -> np.ndarray | None:
        slots = self.allocator.extend(have, last_slot, count)
        if slots is None and self._evict(count + self.page_size):
            slots = self.allocator.extend(have, last_slot, count)
        return slots

    def _evict(self, num_tokens: int) -> bool:
        missing = num_tokens - self.allocator.num_free
        if missing <= 0 or not self.cache.num_evictable:
            return False
        self.allocator.free(self.cache.evict(missing))
        return True

    def _lock(self, row: int, node: Node) -> None:
        old = self.nodes[row]
        if node is not old:
            self.cache.lock(node)
            self.cache.unlock(old)
            self.nodes[row] = node

    def _seed_of(self, request: Request) -> int:
        seed = request.sampling_params.sampling_seed
        if seed is None:  # drawn once, so that a retracted request repeats its own choices
            seed = request.sampling_params.sampling_seed = self._random.getrandbits(62)
        return seed

    # ---- the queue's order ----

    def _sort_waiting(self) -> None:
        """Anew when requests have come: a tree that grows in between is worth less than matching the queue again."""
        if not self._is_sorted and len(self.waiting) <= MAX_SORTED_QUEUE:
            self.waiting.reorder(self._by_policy())
        self._is_sorted = True

    def _by_policy(self) -> list[Request]:
        waiting = sorted(self.waiting, key=lambda r: r.times.arrived)
        # Whom the policy likes least is overtaken only so often.
        newest_overdue = self.num_admitted - MAX_OVERTAKEN
        overdue = [r for r in waiting if r.num_admitted_before <= newest_overdue]
        waiting = [r for r in waiting if r.num_admitted_before > newest_overdue]
        if self.policy == "random":
            self._random.shuffle(waiting)
        elif self.policy == "lpm":
            waiting.sort(key=lambda r: -self.cache.match_len(r.all_token_ids(), r.extra_key))
        elif self.policy == "dfs-weight":
            waiting = _depth_first(
                waiting, {id(r): self.cache.match(r.all_token_ids(), r.extra_key).node for r in waiting}
            )
        return overdue + waiting

    # ---- leaving ----

    def _retract(self, request: Request) -> None:
        """Take everything back from a running request and queue it again, first."""
        self._release(request, keep=False)
        request.status = Status.WAITING
        request.num_retractions += 1
        self.num_retractions += 1
        self.shares.enter(request)
        self.waiting.add(request, is_first=True)
        self._is_sorted = False
        live = self._decoding
        if len(live):  # what ran so far says how long answers get; be that careful, and a little more
            used = self.rows.num_tokens[live] - (self.rows.max_tokens[live] - self._max_new(live))
            ratio = (float(used.sum()) + 20 * len(live)) / max(float(self._max_new(live).sum()), 1.0)
            self.new_token_ratio = min(1.0, max(self.new_token_ratio, ratio))

    def _max_new(self, rows: np.ndarray) -> np.ndarray:
        prompt_lens = [request.prompt_len for row in rows.tolist() if (request := self.rows.requests[row])]
        return self.rows.max_tokens[rows] - np.array(prompt_lens, np.int64)

    def _release(self, request: Request, *, keep: bool) -> None:
        """Free the row and every slot the tree does not own; `keep`: hand computed tokens to the tree first."""
        rows, row = self.rows, request.row
        cached, num_slots = int(self.cached_lens[row]), int(self.num_slots[row])
        if keep:
            # The last known token's KV exists only if a launched step computes it: not certain, so left out.
            stop = min(int(rows.num_known[row]) - 1, int(rows.num_computed[row]))
            stop -= stop % self.page_size
            if self._is_cached and stop > cached:
                num_existing, _ = self.cache.insert(
                    rows.token_ids[row, :stop], rows.slots[row, :stop], request.extra_key
                )
                if num_existing > cached:
                    self.allocator.free(rows.slots[row, cached:num_existing])
                cached = stop
        if num_slots > cached:
            self.allocator.free(rows.slots[row, cached:num_slots])
        self.cache.unlock(self.nodes.pop(row))
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            self._set_decoding(self._decoding[self._decoding != row])
        rows.free(row)

    # ---- what a step brought ----

    def resolve(self, plan: Plan, tokens: np.ndarray) -> Outcome:
        """Take in the tokens (int32 [S], -1: the logits were not finite) that `plan` sampled."""
        rows = self.rows
        outcome = Outcome()
        tokens = tokens.astype(np.int64)
        if plan.rows is self._decoding and not self._live.has_extras:  # nobody has come or gone
            these, sampled, places, index = self._live, plan.rows, plan.seq_lens, plan.samples
        else:
            sampled, places = plan.rows[plan.samples], plan.seq_lens[plan.samples]
            is_current = (rows.epoch[sampled] == plan.epochs[plan.samples]) & (rows.num_known[sampled] == places)
            (index,) = is_current.nonzero()
            sampled, tokens, places = sampled[index], tokens[index], places[index]
            these = RowSet(rows, sampled)
        rows.token_ids[sampled, places] = tokens
        rows.num_known[sampled] = lens = places + 1
        outcome.num_tokens = len(sampled)

        ends = lens >= these.max_tokens
        if these.stops_at_eos is not None:
            ends |= self.is_eos[tokens] & these.stops_at_eos
        is_finite = tokens >= 0
        if np.count_nonzero(is_finite) == len(tokens):
            outcome.requests, outcome.watched, wanted = these.requests, these.watched, these.wanted
        else:
            ends |= ~is_finite
            finite = RowSet(rows, sampled[is_finite])
            outcome.requests, outcome.watched = finite.requests, finite.watched
            wanted = is_finite.nonzero()[0][finite.wanted]
        is_all = len(wanted) == len(tokens)
        outcome.token_ids = (tokens if is_all else tokens[wanted]).tolist()
        outcome.samples = index if is_all else index[wanted]
        if these.has_extras:
            for i in np.flatnonzero(rows.has_stop_ids[sampled]).tolist():
                ends[i] |= tokens[i] in _request_of(rows, sampled[i]).sampling_params.stop_token_ids
        if these.has_extras and rows.has_matcher[sampled].any():
            for i in np.flatnonzero(rows.has_matcher[sampled] & is_finite).tolist():
                request, token = _request_of(rows, sampled[i]), int(tokens[i])
                if self._is_stop(request, token):
                    continue
                forced, end = self._follow(request, token)
                if forced and request.wants_tokens:
                    outcome.forced.append((request, forced))
                outcome.num_tokens += len(forced)
                if end is not None:
                    ends[i] = False
                    self.finish(request, end)
                    outcome.finished.append(request)
        for i in ends.nonzero()[0].tolist():
            request, token = _request_of(rows, sampled[i]), int(tokens[i])
            if token < 0:
                rows.num_known[sampled[i]] -= 1
                message = "the model's output is not finite (NaN or inf)"
                if rows.has_mask[sampled[i]]:
                    message += ", or min_new_tokens forbids all that the grammar allows"
                reason = FinishReason("abort", message=message, status_code=500)
            elif self._is_stop(request, token):
                reason = FinishReason("stop", matched=token)
            else:
                reason = FinishReason("length")
            self.finish(request, reason)
            outcome.finished.append(request)
        for b, request in plan.prefill_only:
            if request.status is Status.RUNNING and rows.epoch[request.row] == plan.epochs[b]:
                self.finish(request, FinishReason("length"))
                outcome.finished.append(request)
        return outcome

    def _follow(self, request: Request, token: int) -> tuple[list[int], FinishReason | None]:
        """Tell the request's matcher its newest token. Returns what that forces, now known, and the end, if it is."""
        row, matcher = request.row, request.matcher
        assert matcher is not None
        room = int(self.rows.max_tokens[row] - self.rows.num_known[row])
        try:
            matcher.advance(token)
            forced = matcher.jump(room) if matcher.may_jump else []
        except GrammarError as error:
            return [], FinishReason("abort", message=f"the grammar failed: {error}", status_code=500)
        stop = next((i for i, token in enumerate(forced) if self._is_stop(request, token)), None)
        if stop is not None:
            forced = forced[: stop + 1]
        if forced:
            self.rows.append(row, forced)
            request.num_forced_tokens += len(forced)
        if stop is not None:
            return forced, FinishReason("stop", matched=forced[-1])
        if matcher.is_finished:  # no step is spent on an end-of-sequence token that alone could come
            return forced, FinishReason("stop")
        return forced, FinishReason("length") if len(forced) == room else None

    def matchers_of(self, plan: Plan, masked: np.ndarray) -> tuple[list[int], list[Matcher]] | None:
        """Of the samples `masked`, those that are still wanted, and their matchers; None: a token before one of them
        is still on the device."""
        rows = self.rows
        b = plan.samples[masked]
        is_alive = rows.epoch[plan.rows[b]] == plan.epochs[b]
        num_unknown = plan.seq_lens[b] - rows.num_known[plan.rows[b]]
        if (num_unknown[is_alive] > 0).any():
            return None
        is_wanted = is_alive & (num_unknown == 0)
        matchers = [_request_of(rows, row).matcher for row in plan.rows[b[is_wanted]].tolist()]
        return masked[is_wanted].tolist(), [matcher for matcher in matchers if matcher is not None]

    def request_of(self, plan: Plan, sample: int) -> Request:
        """Whose token it is; the request must still be running."""
        return _request_of(self.rows, plan.rows[plan.samples[sample]])

    def output_ids(self, request: Request, start: int) -> list[int]:
        """The tokens of an answer that are known, from number `start` on."""
        if request.status is not Status.RUNNING:
            return request.output_ids[start:]
        return self.rows.output_ids(request, start)

    def cut(self, request: Request, num_tokens: int) -> None:
        """Take back the last `num_tokens` of an answer, whose text ended before them."""
        if request.status is Status.RUNNING:
            self.rows.num_known[request.row] -= num_tokens
        elif num_tokens:
            del request.output_ids[-num_tokens:]
        request.num_forced_tokens -= num_tokens

    def _is_stop(self, request: Request, token: int) -> bool:
        params = request.sampling_params
        return (self.is_eos[token] and not params.ignore_eos) or token in params.stop_token_ids

    def fail(self, plan: Plan, reason: FinishReason) -> list[Request]:
        """End the requests of a step that raised; everything else that runs is computed anew. Returns the ended."""
        alive = plan.rows[self.rows.epoch[plan.rows] == plan.epochs]
        failed = [request for row in alive.tolist() if (request := self.rows.requests[row]) is not None]
        for request in failed:
            self.finish(request, reason)
        self.retract_all()
        self.drop_cache()  # it names tokens that the step never stored
        return failed

    def abandon(self, reason: FinishReason) -> list[Request]:
        """After `schedule` itself raised: nobody knows how far it came. Returns the requests that this ends.

        They are all that run, since no slot's owner is certain any more, and without any the first in the queue, which
        would raise again. Pool and cache start afresh; steps still in flight are recognized by their epochs.
        """
        ended = self.running_requests()
        for request in ended:
            self.rows.free(request.row)
        if not ended and self.waiting:
            request = self.waiting.next()
            self.waiting.remove(request)
            self.shares.leave(request)
            ended.append(request)
        for request in ended:
            request.status, request.finish_reason = Status.FINISHED, reason
            self.shares.settle(request)
        self.nodes.clear()
        self.prefilling.clear()
        self._set_decoding(self._decoding[:0])
        self.allocator = PageAllocator(self.allocator.num_pages, self.page_size)
        self.cache = type(self.cache)(self.page_size)
        return ended

    # ---- shared prefixes ----

    def _shared_prefixes(self, decodes: np.ndarray, epochs: np.ndarray) -> Groups | None:
        """Put each decoding row into the group of the tree node whose shared reading saves most, if that is much."""
        if len(decodes) < 2:
            return None
        if decodes is self._grouped:
            return self._groups
        self._grouped, key = decodes, (decodes.tobytes(), epochs.tobytes())
        if key == self._grouped_key:
            return self._groups
        self._grouped_key, self._groups = key, None
        if int(self.cached_lens[decodes].sum()) < MIN_SHARED_TOKENS:
            return None
        # By the deepest node that each shares with anybody: most rows have leaves of their own, and few nodes the rest.
        sharing: dict[Node, list[int]] = {}
        for i, row in enumerate(decodes.tolist()):
            sharing.setdefault(_shared_node(self.nodes[row]), []).append(i)
        num_users: Counter[Node] = Counter()
        for node, indices in sharing.items():
            for above in self.cache.path(node):
                num_users[above] += len(indices)
        members: dict[Node, list[int]] = {}
        for node, indices in sharing.items():
            path = self.cache.path(node)
            best = max(path, key=lambda node: (num_users[node] - 1) * node.depth_tokens, default=None)
            if best is not None:
                members.setdefault(best, []).extend(indices)
        members = {node: indices for node, indices in members.items() if len(indices) > 1}
        if sum((len(indices) - 1) * node.depth_tokens for node, indices in members.items()) >= MIN_SHARED_TOKENS:
            own_starts = np.zeros(len(decodes), np.int32)
            for node, indices in members.items():
                own_starts[indices] = node.depth_tokens
            self._groups = Groups(
                prefix_lens=np.array([node.depth_tokens for node in members], np.int32),
                cu_members=np.cumsum([0, *map(len, members.values())], dtype=np.int32),
                members=np.concatenate([np.array(indices, np.int32) for indices in members.values()]),
                own_starts=own_starts,
            )
        return self._groups

    def stats(self) -> SchedulerStats:
        free, cached = self.allocator.num_free, self.cache.num_evictable
        return SchedulerStats(
            num_running=len(self.nodes),
            num_waiting=len(self.waiting),
            num_waiting_tokens=self.shares.num_waiting_tokens,
            num_total_tokens=self.allocator.num_total,
            num_free_tokens=free,
            num_cached_tokens=cached,
            num_held_tokens=self.allocator.num_total - free - cached,
            num_retractions=self.num_retractions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_hit_tokens=self.num_hit_tokens,
            new_token_ratio=self.new_token_ratio,
        )


def _request_of(rows: Rows, row: int) -> Request:
    request = rows.requests[row]
    assert request is not None
    return request


def _shared_node(node: Node) -> Node:
    """The deepest node above `node`, or itself, that more than one request locks; else the root."""
    while node.lock_ref == 1 and node.parent is not None:
        node = node.parent
    return node


def _peak_growth(remaining: np.ndarray, own: np.ndarray) -> int:
    """Slots that requests will hold at the worst time beyond those they hold now.

    remaining: [B] tokens to come, one a step; own: [B] tokens whose slots, like those of the ones to come, go free at
    the end. Most is held just before an end, so those are the times to look at (Gong et al. 2025,
    arXiv:2507.10150).
    """
    order = remaining.argsort()
    remaining, own = remaining[order], own[order]
    num_growing = np.arange(len(order), 0, -1)
    given_back = own.cumsum() - own
    return int((remaining * num_growing - given_back).max(initial=0))


def _depth_first(waiting: list[Request], node_of: dict[int, Node]) -> list[Request]:
    """Requests in depth-first order of the tree nodes they match, the branch with more requests first."""
    weights: Counter[int] = Counter()
    paths: dict[int, list[int]] = {}
    for request in waiting:
        node: Node | None = node_of[id(request)]
        path = []
        while node is not None:
            path.append(id(node))
            node = node.parent
        paths[id(request)] = path[::-1]
        weights.update(path)
    return sorted(waiting, key=lambda r: [(-weights[node], node) for node in paths[id(r)]])

"""The scheduler plays traffic without a model: a token is a function of what came before, so recomputation shows."""

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from cache.allocator import PageAllocator
from cache.radix import NoCache, RadixCache
from cache.window import WindowSlots
from cache.window_radix import WindowRadixCache
from engine.errors import PromptTooLong, QueueFull
from engine.request import Request, SamplingParams
from engine.schedule import policy
from engine.schedule.holdings import Holdings
from engine.schedule.plan import Plan, PrefillBudget, prefill_work
from engine.schedule.resolver import Outcome
from engine.schedule.rows import Rows
from engine.schedule.scheduler import Scheduler
from engine.schedule.window_holdings import WindowHoldings
from engine.state import FinishReason, RequestState, Status

VOCAB = 1000
EOS = 0


def next_token(token_ids: np.ndarray) -> int:
    """Return a token that depends on the whole sequence and is never EOS: a stand-in for a model."""
    return 1 + hash(token_ids.tobytes()) % (VOCAB - 1)


class Traffic:
    """A scheduler with steps in flight, and a KV pool that remembers which token each slot was written for."""

    def __init__(
        self, num_tokens: int = 64, num_rows: int = 8, page_size: int = 1, chunk: int = 16, depth: int = 2,
        cached: bool = True, window: int = 0, num_window_tokens: int = 0, **options: object,
    ) -> None:  # fmt: skip
        """window: tokens that some layers see, whose pool has `num_window_tokens`; 0: all layers see all."""
        is_eos = np.zeros(VOCAB, bool)
        is_eos[EOS] = True
        self.rows = Rows(num_rows, max_len=num_tokens)
        self.allocator = PageAllocator(num_tokens // page_size + 1, page_size)
        self.cache = (RadixCache if cached else NoCache)(page_size)
        self.windows = None
        if window:
            self.cache = WindowRadixCache(page_size, window) if cached else self.cache
            num_window_pages = num_window_tokens // page_size + 1
            self.windows = WindowSlots(self.allocator.num_pages, num_window_pages, page_size, window)
        self.scheduler = Scheduler(
            self.rows,
            self.allocator,
            self.cache,
            is_eos=is_eos,
            chunked_prefill_size=chunk,
            windows=self.windows,
            **options,  # type: ignore[arg-type]
        )
        self.depth = depth
        self.in_flight: list[tuple[Plan, np.ndarray]] = []
        self.last_tokens = np.zeros(num_rows + 1, np.int32)
        self.slot_table = np.zeros((num_rows + 1, num_tokens + 1), np.int32)
        self.stored = np.full(self.allocator.num_total + page_size, -1)  # slot -> token whose KV is there
        self.window_slots = np.zeros_like(self.stored)  # slot -> slot of the pool of windows
        self.stored_windows = np.full(num_window_tokens + page_size, -1)  # slot -> place and token of what is there
        self.computed_tokens = 0

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int = 4,
        *,
        stream: bool = False,
        may_shorten: bool = False,
        **fields: Any,
    ) -> RequestState:
        params = SamplingParams(max_new_tokens=max_new_tokens, **fields)
        request = Request(f"r{random.random()}", prompt, params, stream=stream, may_shorten=may_shorten)
        state = RequestState(request)
        self.scheduler.submit(state)
        return state

    def step(self) -> Outcome | None:
        """Take one turn of the loop; None when nothing is left to do."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append((plan, self.run(plan)))
        if not self.in_flight:
            return None
        if plan is None or len(self.in_flight) >= self.depth:
            return self.scheduler.resolve(*self.in_flight.pop(0))
        return Outcome()

    def run(self, plan: Plan) -> np.ndarray:
        """Do what the device does: store, then read back every token a request attends to."""
        for row, start, slots in plan.prefix_copies:
            self.slot_table[row, start : start + len(slots)] = slots
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a request stands in a step twice"
        ends = np.cumsum(plan.q_lens)
        inputs = plan.input_ids.copy()
        news: set[int] = set()  # slots that hold another token than before
        for b, row in enumerate(plan.rows):
            for t in range(ends[b] - plan.q_lens[b], ends[b]):
                position = plan.seq_lens[b] - (ends[b] - t)
                inputs[t] = self.last_tokens[row] if inputs[t] < 0 else inputs[t]
                self.slot_table[row, position] = slot = plan.out_cache_loc[t]
                if self.stored[slot] != inputs[t]:
                    news.add(int(slot))
                self.stored[slot] = inputs[t]
        self.computed_tokens += len(inputs)
        if plan.num_decodes == len(plan.rows):
            for row, seq_len in zip(plan.rows, plan.seq_lens, strict=True):
                old = self.slot_table[row, : seq_len - 1]
                assert news.isdisjoint(old.tolist()), "single tokens of a step see what it stores for others"
        if self.windows is not None:
            self.check_windows(plan, inputs)
        if plan.groups is not None:
            self.check_groups(plan)
        assert plan.out_cache_loc.min() >= self.allocator.page_size, "wrote into the dump page"
        tokens = []
        for b in plan.samples:
            row = plan.rows[b]
            seen = self.stored[self.slot_table[row, : plan.seq_lens[b]]].astype(np.int32)
            tokens.append(next_token(seen))
            self.last_tokens[row] = tokens[-1]
        return np.array(tokens, np.int32)

    def check_windows(self, plan: Plan, inputs: np.ndarray) -> None:
        """Store in the pool of windows as well, and assert that all that layers with a window see is there."""
        assert self.windows is not None and plan.window_cache_loc is not None
        window, page_size = self.windows.window, self.windows.page_size
        assert plan.window_cache_loc.min() >= page_size, "wrote into the dump page, or what has no slot"
        positions = np.concatenate([np.arange(n - q, n) for q, n in zip(plan.q_lens, plan.seq_lens, strict=True)])
        self.window_slots[plan.out_cache_loc] = plan.window_cache_loc
        self.stored_windows[plan.window_cache_loc] = positions * VOCAB + inputs
        for row, q_len, seq_len in zip(plan.rows, plan.q_lens, plan.seq_lens, strict=True):
            seen = np.arange(max(seq_len - q_len + 1 - window, 0), seq_len)
            slots = self.slot_table[row, seen]
            stored = self.stored_windows[self.window_slots[slots]]
            assert stored.tolist() == (seen * VOCAB + self.stored[slots]).tolist()

    def check_groups(self, plan: Plan) -> None:
        """Assert that a group's members have the same slots for its prefix, and their own part begins behind it."""
        groups = plan.groups
        assert groups is not None
        for g, prefix_len in enumerate(groups.prefix_lens):
            members = groups.members[groups.cu_members[g] : groups.cu_members[g + 1]]
            heads = self.slot_table[plan.rows[members], :prefix_len]
            assert (heads == heads[0]).all()
            assert (groups.own_starts[members] == prefix_len).all()
            assert (plan.seq_lens[members] > prefix_len).all()

    def run_all(self, limit: int = 20_000) -> None:
        for _ in range(limit):
            if self.step() is None:
                assert not self.scheduler.has_work, "stopped with work left"
                self.check_pages()
                return
        raise AssertionError(f"not done after {limit} steps")

    def check_pages(self) -> None:
        stats = self.scheduler.stats()
        assert stats.num_free_tokens + stats.num_cached_tokens + stats.num_held_tokens == stats.num_total_tokens
        num_windows = stats.num_free_window_tokens + stats.num_cached_window_tokens + stats.num_held_window_tokens
        assert num_windows == stats.num_total_window_tokens
        if not self.scheduler.num_running:
            assert stats.num_held_tokens == stats.num_held_window_tokens == 0
            assert self.rows.num_free == self.rows.num_rows
        self.scheduler.check()


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(np.array(tokens, np.int32)))
    return tokens[len(prompt) :]


def prompt_of(rng: random.Random, length: int, heads: list[list[int]]) -> list[int]:
    return (rng.choice(heads) + [rng.randrange(1, VOCAB) for _ in range(length)])[: max(length, 1)]


def play(
    traffic: Traffic,
    rng: random.Random,
    num_requests: int,
    *,
    head_lens: Sequence[int],
    most_tail: int,
    most_new: int,
    most_steps: int,
    abort_share: float = 0.0,
) -> list[RequestState]:
    """Submit requests at random moments, and run all. Some share a head, some are aborted.

    most_tail, most_new, most_steps: tokens of a prompt behind its head, of an answer, steps between two requests.
    """
    heads = [[rng.randrange(1, VOCAB) for _ in range(length)] for length in head_lens]
    states: list[RequestState] = []
    for _ in range(num_requests):
        states.append(traffic.submit(prompt_of(rng, rng.randrange(1, most_tail), heads), rng.randrange(0, most_new)))
        for _ in range(rng.randrange(most_steps)):
            traffic.step()
            traffic.check_pages()
        victim = rng.choice(states)
        if rng.random() < abort_share and victim.status is not Status.FINISHED:
            traffic.scheduler.finish(victim, FinishReason("abort"))
    traffic.run_all()
    return states


def assert_answers(states: list[RequestState]) -> None:
    """Assert that each request has the answer it would get alone; an aborted one, the beginning of it."""
    for state in states:
        answer = expected(state.request.input_ids, state.max_new_tokens)
        assert state.status is Status.FINISHED
        assert state.output_ids == answer[: len(state.output_ids)]
        is_aborted = state.finish_reason is not None and state.finish_reason.type == "abort"
        assert is_aborted or state.output_ids == answer


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_every_answer_is_the_one_it_would_get_alone(page_size: int, chunk: int, depth: int, cached: bool) -> None:
    rng = random.Random(page_size * 100 + chunk + depth)
    traffic = Traffic(96, num_rows=6, page_size=page_size, chunk=chunk, depth=depth, cached=cached)
    assert_answers(play(traffic, rng, 60, head_lens=[20] * 3, most_tail=40, most_new=30, most_steps=4))
    if not cached:
        assert traffic.cache.num_cached == 0


@pytest.mark.parametrize("seed", range(6))
def test_answers_survive_a_pool_that_runs_out_again_and_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)  # groups form and dissolve all the time
    rng = random.Random(seed)
    page_size = rng.choice([1, 1, 4])
    traffic = Traffic(64, num_rows=rng.choice([3, 6]), chunk=rng.choice([3, 9, 40]), page_size=page_size,
                      conservativeness=0.0)  # fmt: skip
    assert_answers(play(traffic, rng, 80, head_lens=[12] * 2, most_tail=24, most_new=32, most_steps=6, abort_share=0.1))


def test_a_pool_too_small_for_all_retracts_and_still_finishes_everyone() -> None:
    traffic = Traffic(64, num_rows=8, conservativeness=0.0)
    states = [traffic.submit([i + 1] * 4, max_new_tokens=40) for i in range(8)]
    traffic.run_all()
    assert traffic.scheduler.num_retractions > 0
    assert all(r.output_ids == expected(r.request.input_ids, 40) for r in states)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_answers_of_known_length_are_not_retracted(seed: int, page_size: int) -> None:
    rng = random.Random(seed)
    traffic = Traffic(400, num_rows=40, page_size=page_size, chunk=64, conservativeness=0.0)
    states = [
        traffic.submit(prompt_of(rng, rng.randint(5, 40), [[]]), rng.randint(1, 60), ignore_eos=True) for _ in range(60)
    ]
    traffic.run_all()
    assert traffic.scheduler.num_retractions == 0
    assert all(len(r.output_ids) == r.max_new_tokens for r in states)


def test_slots_that_an_answer_will_have_given_back_are_counted_on() -> None:
    traffic = Traffic(64)
    traffic.submit([2] * 30, 4, ignore_eos=True)
    traffic.submit([3] * 20, 20, ignore_eos=True)  # 40 with the answer: fits once the 34 of the other are free
    for _ in range(4):
        traffic.step()
    assert traffic.scheduler.stats().num_running == 2
    traffic.run_all()
    assert traffic.scheduler.num_retractions == 0


def test_slots_of_a_shared_prefix_are_not_counted_on() -> None:
    traffic = Traffic(64, chunk=64)
    traffic.submit([2] * 30, 30, ignore_eos=True)
    traffic.step()
    for i in range(2):  # the first one's end frees none of the prefix
        traffic.submit([2] * 29 + [3 + i], 4 + 26 * i, ignore_eos=True)
    for _ in range(3):
        traffic.step()
    assert traffic.scheduler.stats().num_running == 2
    traffic.run_all()
    assert traffic.scheduler.num_retractions == 0


@pytest.mark.parametrize(
    ("options", "num_running"),
    [({"ignore_eos": True}, 1), ({}, 2), ({"ignore_eos": True, "stop_token_ids": [EOS]}, 2)],
)
def test_only_an_answer_that_cannot_end_early_reserves_all_its_slots(options: dict[str, Any], num_running: int) -> None:
    traffic = Traffic(64, conservativeness=0.0)
    for head in (2, 3):
        traffic.submit([head] * 8, 30, **options)
    for _ in range(3):
        traffic.step()
    assert traffic.scheduler.stats().num_running == num_running
    traffic.run_all()


@pytest.mark.parametrize("policy", ["lpm", "fcfs", "dfs-weight", "random"])
def test_each_policy_serves_everyone(policy: str) -> None:
    traffic = Traffic(96, num_rows=2, policy=policy)
    heads = [[5] * 10, [6] * 10]
    rng = random.Random(1)
    states = [traffic.submit(prompt_of(rng, 15, heads), 3) for _ in range(30)]
    traffic.run_all()
    assert all(r.output_ids == expected(r.request.input_ids, 3) for r in states)


def test_a_request_that_matches_nothing_is_overtaken_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "MAX_OVERTAKEN", 5)
    traffic = Traffic(96, num_rows=1, policy="lpm")
    traffic.submit(list(range(1, 30)))
    traffic.run_all()
    stranger = traffic.submit(list(range(500, 510)))
    for i in range(8):
        traffic.submit([*range(1, 30), 40 + i])
    while stranger.status is Status.WAITING:
        traffic.submit([*range(1, 30), 60])
        traffic.step()
    assert traffic.scheduler.num_admitted - stranger.num_admitted_before == 5 + 1


def test_lpm_runs_the_longest_cached_prefix_first() -> None:
    traffic = Traffic(96, num_rows=1, policy="lpm")
    traffic.submit([7] * 20, 1)
    traffic.run_all()
    cold, warm = traffic.submit([8] * 20, 1), traffic.submit([7] * 20 + [9], 1)
    traffic.step()
    assert warm.status is Status.RUNNING and cold.status is Status.WAITING


def test_requests_of_one_step_share_a_prompt_that_none_has_computed_yet() -> None:
    traffic = Traffic(256, chunk=128)
    states = [traffic.submit([3] * 50, 2) for _ in range(4)]
    traffic.step()
    assert traffic.computed_tokens == 50 + 3  # the others recompute one token, for its logits
    traffic.run_all()
    assert all(r.output_ids == expected([3] * 50, 2) for r in states)


def test_a_prefix_is_hit_once_by_each_request_however_long_that_waits_and_is_read() -> None:
    traffic = Traffic(num_tokens=80, chunk=8)
    prompt = list(range(1, 41))
    traffic.submit(prompt, max_new_tokens=1)
    traffic.run_all()
    assert traffic.cache.top_prefixes(9) == []
    traffic.submit([99] * 60, max_new_tokens=10)
    traffic.step()
    traffic.submit([*prompt, *range(50, 80)], max_new_tokens=1)  # has to wait for it
    traffic.run_all()
    assert [prefix.hits for prefix in traffic.cache.top_prefixes(9)] == [1]


def test_an_identical_prompt_computes_one_token() -> None:
    traffic = Traffic(96)
    traffic.submit([4] * 30, 1)
    traffic.run_all()
    before = traffic.computed_tokens
    again = traffic.submit([4] * 30, 1)
    traffic.run_all()
    assert traffic.computed_tokens - before == 1
    assert again.num_cached_tokens == 29


def test_a_step_of_single_tokens_stores_nothing_that_another_of_its_requests_sees() -> None:
    traffic = Traffic(96)
    traffic.submit([4] * 30, 1)
    traffic.run_all()
    states = [traffic.submit([4] * 30 + [5] * n, 1) for n in (1, 2, 3)]  # each would find the one before
    plan = traffic.scheduler.schedule()
    assert plan is not None
    assert [state.num_cached_tokens for state in states] == [30, 30, 32]
    assert sorted(plan.q_lens.tolist()) == [1, 1, 2], "more than one token may be read at once, one may not"
    traffic.in_flight.append((plan, traffic.run(plan)))
    traffic.run_all()
    assert traffic.submit([4] * 30 + [5, 6], 1) and traffic.scheduler.schedule()
    assert traffic.scheduler.running()[0].num_cached_tokens == 31, "but later ones find it"


def test_windows_of_a_prompt_that_is_cached_to_its_end_stay_while_it_is_answered() -> None:
    traffic = Traffic(128, window=8, num_window_tokens=96)
    traffic.submit([4] * 30, 1)
    traffic.submit([*[4] * 30, 5, 6], 1)
    traffic.run_all()
    traffic.submit([4] * 30, 5)
    traffic.step()
    held = traffic.scheduler.held
    assert isinstance(held, WindowHoldings)
    held.windows.free(held._tree.evict_window(1000))
    traffic.submit(list(range(100, 160)), 1)  # takes the window slots that came free
    traffic.run_all()  # looks at all that layers with windows see


def test_after_a_single_token_of_a_prompt_a_step_takes_no_further_prompt() -> None:
    traffic = Traffic(96)
    states = [traffic.submit([4] * 9, 1), traffic.submit([4, 5], 1)]
    budget = PrefillBudget(16, work=1.5 * prefill_work(1, 0, 0.0))
    plan = traffic.scheduler.schedule(budget)
    assert plan is not None and plan.q_lens.tolist() == [1]
    assert [state.status for state in states] == [Status.RUNNING, Status.WAITING]


def test_a_chunk_of_a_prompt_is_not_counted_as_forced_tokens() -> None:
    traffic = Traffic()
    traffic.submit(list(range(1, 20)))
    plan = traffic.scheduler.schedule()
    assert plan is not None and plan.num_prefill_tokens == 16 and plan.num_jumps == 0


class ForcedRun:
    """Stands in for a matcher: `tokens` follow the first token of the answer, behind them anything may come."""

    may_jump, masks, is_finished = True, False, False

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def advance(self, token: int) -> None:
        pass

    def jump(self, max_tokens: int) -> list[int]:
        tokens, self.tokens = self.tokens, []
        return tokens


@pytest.mark.parametrize("num_forced", [2, 8])
@pytest.mark.parametrize("num_tokens", [17, 19, 21, 40])
def test_forced_tokens_that_a_step_has_no_room_for_come_in_the_next(num_forced: int, num_tokens: int) -> None:
    traffic = Traffic(num_tokens, chunk=4, depth=1, conservativeness=0.0)
    forced = list(range(101, 101 + num_forced))
    plain, jumping = traffic.submit([1, 2, 3], 14), traffic.submit([4, 5, 6], 14)
    jumping.matcher = ForcedRun(forced)  # type: ignore[assignment]
    traffic.run_all()
    first = expected([4, 5, 6], 1) + forced
    assert plain.output_ids == expected([1, 2, 3], 14)
    assert jumping.output_ids == first + expected([4, 5, 6, *first], 14 - len(first))


def test_forced_tokens_are_not_taken_for_the_end_of_a_prompt() -> None:
    traffic = Traffic(depth=1)
    state = traffic.submit([1, 2, 3], 10)
    state.matcher = ForcedRun([4, 5])  # type: ignore[assignment]
    answering = []
    while plan := traffic.scheduler.schedule():
        answering.append(plan.answering)
        traffic.scheduler.resolve(plan, traffic.run(plan))
    assert answering == [[state]] + [[]] * (len(answering) - 1)


def test_zero_new_tokens_fills_the_cache_and_answers_nothing() -> None:
    traffic = Traffic(96)
    state = traffic.submit([4] * 30, 0)
    traffic.run_all()
    assert state.output_ids == [] and state.finish_reason == FinishReason("length")
    assert traffic.cache.num_cached == 30


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    traffic = Traffic(64)
    with pytest.raises(PromptTooLong, match=r"50 tokens and max_new_tokens is 20, .* 64"):
        traffic.submit([1] * 50, 20)
    traffic.submit([1] * 44, 20)
    traffic.run_all()


def test_an_answer_that_may_be_shortened_gets_the_room_there_is_and_at_least_a_token() -> None:
    traffic = Traffic(64)
    state = traffic.submit([1] * 50, 20, may_shorten=True)
    short = traffic.submit([2] * 50, 3, may_shorten=True)
    assert (state.max_new_tokens, short.max_new_tokens) == (14, 3)
    traffic.run_all()
    assert (len(state.output_ids), state.finish_reason) == (14, FinishReason("length"))
    for prompt_len in (64, 65):
        with pytest.raises(PromptTooLong) as error:
            traffic.submit([1] * prompt_len, 20, may_shorten=True)
        assert (error.value.prompt_len, error.value.answer_len, error.value.limit) == (prompt_len, 0, 64)


def test_a_full_queue_refuses() -> None:
    traffic = Traffic(64, num_rows=1, max_queued=2)
    for _ in range(3):
        traffic.submit([1], 1)
    with pytest.raises(QueueFull, match="2 requests are waiting, the limit is 2"):
        traffic.submit([1], 1)


@pytest.mark.parametrize("max_queued", [0, 1])
def test_requests_that_come_at_once_fill_the_free_rows_before_they_wait(max_queued: int) -> None:
    traffic = Traffic(256, num_rows=3, max_queued=max_queued)
    for _ in range(3 + max_queued):
        traffic.submit([1, 2], 8)
    with pytest.raises(QueueFull, match=f"the limit is {max_queued}"):
        traffic.submit([1], 1)
    traffic.step()
    with pytest.raises(QueueFull) if max_queued else contextlib.nullcontext():  # an empty queue always takes one
        traffic.submit([1], 1)
    traffic.run_all()
    for _ in range(3):
        traffic.submit([1], 1)


def test_rows_are_not_free_for_those_behind_one_that_waits_for_memory() -> None:
    traffic = Traffic(64, num_rows=8, max_queued=2)
    for start in (1, 100):
        traffic.submit(list(range(start, start + 40)), 8)
    for _ in range(6):
        traffic.step()
    assert traffic.scheduler.num_running == 1 and traffic.rows.num_free
    traffic.submit([1], 1)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        traffic.submit([1], 1)


def test_a_full_queue_takes_the_rest_of_an_http_request_whose_first_prompt_it_took() -> None:
    traffic = Traffic(256, num_rows=1, max_queued=1, max_queued_tokens=4)
    states = [RequestState(Request(str(i), [1, 2], SamplingParams(max_new_tokens=1))) for i in range(8)]
    for state in states:
        state.joins_others = state is not states[0]
        traffic.scheduler.submit(state)
    with pytest.raises(QueueFull):
        traffic.submit([1], 1)
    traffic.run_all()
    assert all(state.status is Status.FINISHED for state in states)


def test_an_aborted_request_frees_its_slots_before_the_next_plan() -> None:
    traffic = Traffic(64)
    running = traffic.submit([1] * 10, 40)
    for _ in range(5):
        traffic.step()
    traffic.scheduler.finish(running, FinishReason("abort"))
    stats = traffic.scheduler.stats()
    assert stats.num_held_tokens == 0 and stats.num_running == 0
    traffic.run_all()


def test_a_failed_step_ends_its_own_requests_and_recomputes_the_rest() -> None:
    traffic = Traffic(96, chunk=10)
    bystander = traffic.submit([2] * 25, 5)
    traffic.step()
    plan = traffic.scheduler.schedule()
    assert plan is not None
    only_bystander = traffic.rows.states[plan.rows[0]] is bystander
    assert only_bystander
    traffic.in_flight.clear()
    failed = traffic.scheduler.fail(plan, FinishReason("abort", message="boom", status_code=500))
    assert failed == [bystander] and traffic.cache.num_cached == 0
    later = traffic.submit([2] * 25, 5)
    traffic.run_all()
    assert later.output_ids == expected([2] * 25, 5)


def test_a_scheduler_that_raises_ends_what_runs_and_serves_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(96, num_rows=2)
    running, waiting = [traffic.submit([i] * 5, 9) for i in (2, 3)], traffic.submit([4] * 5, 9)
    traffic.step()

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(traffic.scheduler.held.allocator, "extend_each", broken)
    with pytest.raises(RuntimeError, match="injected"):
        traffic.step()
    assert traffic.scheduler.abandon(FinishReason("abort", status_code=500)) == running
    traffic.allocator, traffic.cache = traffic.scheduler.held.allocator, traffic.scheduler.held.cache
    traffic.run_all()
    assert waiting.output_ids == expected([4] * 5, 9)


def test_not_finite_logits_end_one_request_and_no_other() -> None:
    traffic = Traffic(96)
    good, bad = traffic.submit([2] * 5, 5), traffic.submit([3] * 5, 5)
    plan = traffic.scheduler.schedule()
    assert plan is not None
    tokens = traffic.run(plan)
    tokens[[traffic.rows.states[row] is bad for row in plan.rows]] = -1
    outcome = traffic.scheduler.resolve(plan, tokens)
    assert outcome.finished == [bad] and bad.finish_reason is not None and bad.finish_reason.status_code == 500
    assert bad.output_ids == []
    traffic.run_all()
    assert good.output_ids == expected([2] * 5, 5)


def test_a_stop_token_ends_the_answer_and_ignore_eos_does_not() -> None:
    traffic = Traffic(96)
    stop = expected([2] * 5, 3)[2]
    stopped = traffic.submit([2] * 5, 9, stop_token_ids=[stop])
    traffic.run_all()
    assert stopped.output_ids == expected([2] * 5, 3)
    assert stopped.finish_reason == FinishReason("stop", matched=stop)


def test_decoding_requests_are_grouped_by_the_prefix_they_share() -> None:
    traffic = Traffic(12_000, num_rows=8, chunk=20_000)
    heads = [[2] * 3000, [3] * 1500]
    for i in range(6):
        traffic.submit(heads[i % 2] + [10 + i] * 5, 4)
    traffic.submit([9] * 7, 4)
    traffic.step()
    plan = traffic.scheduler.schedule()
    assert plan is not None and plan.groups is not None
    assert sorted(plan.groups.prefix_lens.tolist()) == [1500, 3000]
    shared = {i: int(n) for i, n in enumerate(plan.groups.own_starts)}
    lengths = {i: int(n) for i, n in enumerate(plan.seq_lens)}
    assert all(shared[i] == {3006: 3000, 1506: 1500, 8: 0}[lengths[i]] for i in lengths)
    for g, prefix_len in enumerate(plan.groups.prefix_lens):
        members = plan.groups.members[plan.groups.cu_members[g] : plan.groups.cu_members[g + 1]]
        assert len({traffic.rows.slots[plan.rows[i], :prefix_len].tobytes() for i in members}) == 1


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_prompt_behind_a_long_cached_one_gets_as_few_tokens_as_its_context_allows(page_size: int) -> None:
    traffic = Traffic(8192, page_size=page_size, chunk=8192)
    head = list(range(1, 3201))
    traffic.submit(head)
    traffic.run_all()
    tails = [traffic.submit([*head, *range(first, first + 400)], max_new_tokens=1) for first in (4000, 5000)]
    budget = PrefillBudget(8192, work=2000, context_cost=1e-3)
    plan = traffic.scheduler.schedule(budget)
    assert plan is not None
    assert plan.q_lens.tolist() == pytest.approx([400, 55], abs=page_size)  # 400 * 4.4 and the rest, at 4.2 each
    assert sum(prefill_work(n, 3200, 1e-3) for n in plan.q_lens) == pytest.approx(2000, abs=5 * page_size)
    assert [state.num_cached_tokens for state in tails] == [3200, 3200]


@pytest.mark.parametrize(
    ("work", "lengths"),
    [
        (1000, [60, 836]),
        (1250, [60, 1220]),
        (1200, [60, 836]),
        (800, [60, 740]),
        (50, [50]),
        (4500, [60, 3000, 1036]),
        (3100, [60, 3000, 40]),
    ],
    ids=[
        "down",
        "up by 3 %",
        "down by a quarter",
        "below the least size",
        "less than the first prompt",
        "all three",
        "not before the end of a prompt that may be whole",
    ],
)
def test_a_prompt_is_cut_where_a_step_is_not_padded(work: int, lengths: list[int]) -> None:
    traffic = Traffic(16384, chunk=8192)
    for length in (60, 3000, 4000):
        traffic.submit([length, *range(1, length)], max_new_tokens=1)
    plan = traffic.scheduler.schedule(PrefillBudget(8192, work=work, sizes=[896, 1280, 4096]))
    assert plan is not None
    assert plan.q_lens.tolist() == lengths


@pytest.mark.parametrize(("work", "expected"), [(1990, 1990), (2400, 2016), (2600, 2600), (math.inf, 8192)])
def test_a_chunk_keeps_to_the_largest_graph_unless_much_more_could_be_computed(work: float, expected: int) -> None:
    budget = PrefillBudget(8192, work=work)
    budget.keep_to_graph(2016)
    assert budget.num_tokens_behind(0) == expected


def test_a_prompt_does_not_starve_where_slow_streams_are_too_many_for_any_graph() -> None:
    budget = PrefillBudget(8192, work=-100.0, min_tokens=128)
    budget.keep_to_graph(0)
    assert not budget.is_spent
    assert budget.num_tokens_behind(0) == 128


@pytest.mark.parametrize(("max_tokens", "cut"), [(880, 820), (860, 388), (1000, 836)])
def test_a_step_without_room_for_a_size_is_padded_by_little_or_not_at_all(max_tokens: int, cut: int) -> None:
    traffic = Traffic(16384, chunk=8192)
    for length in (60, 3000):
        traffic.submit([length, *range(1, length)], max_new_tokens=1)
    plan = traffic.scheduler.schedule(PrefillBudget(max_tokens, sizes=[448, 896, 1280]))
    assert plan is not None
    assert plan.q_lens.tolist() == [60, cut]


# ---- several tokens a row ----

NUM_DRAFTS = 2


def verify_drafts(
    traffic: Traffic, plan: Plan, runs: dict[RequestState, tuple[list[int], int]]
) -> tuple[Plan, np.ndarray, np.ndarray]:
    """Turn a plan of decodes into one that verifies NUM_DRAFTS guesses a row, and run it: what `resolve` is given.

    runs: state -> (its 1 + NUM_DRAFTS tokens, how many of them are accepted). As many guesses are right.
    """
    rows, held = traffic.rows, traffic.scheduler.held
    assert plan.is_decode and len(plan.samples) == len(plan.rows)
    states = rows.states_of(plan.rows)
    for row, seq_len in zip(plan.rows.tolist(), plan.seq_lens.tolist(), strict=True):
        assert held.extend(row, seq_len, seq_len + NUM_DRAFTS)
    rows.num_computed[plan.rows] += NUM_DRAFTS
    rows.num_tokens[plan.rows] += NUM_DRAFTS
    spans = [(row, slice(end - 1, end + NUM_DRAFTS)) for row, end in zip(plan.rows, plan.seq_lens, strict=True)]
    last_known = [rows.token_ids[row, span.start] for row, span in spans]
    guesses = [
        [token if i + 1 < accepted else 0 for i, token in enumerate(tokens[:NUM_DRAFTS])]
        for tokens, accepted in (runs[state] for state in states)
    ]
    plan.cohort, plan.num_decodes, plan.num_drafts = None, 0, np.full(len(states), NUM_DRAFTS)
    plan.q_lens, plan.seq_lens = np.full(len(states), 1 + NUM_DRAFTS), plan.seq_lens + NUM_DRAFTS
    plan.input_ids = np.concatenate([[last, *guess] for last, guess in zip(last_known, guesses, strict=True)])
    plan.out_cache_loc = np.concatenate([rows.slots[row, span] for row, span in spans])
    traffic.run(plan)
    tokens = np.array([runs[state][0] for state in states], np.int32)
    num_accepted = np.array([runs[state][1] for state in states])
    traffic.last_tokens[plan.rows] = tokens[np.arange(len(tokens)), num_accepted - 1]
    return plan, tokens, num_accepted


def answering(traffic: Traffic, *states: RequestState) -> Plan:
    """Return a plan in which all `states`, their prompts read and one token known of each, decode."""
    plan = traffic.scheduler.schedule()
    assert plan is not None
    traffic.scheduler.resolve(plan, traffic.run(plan))
    plan = traffic.scheduler.schedule()
    assert plan is not None and traffic.rows.states_of(plan.rows) == list(states)
    return plan


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_row_gains_as_many_tokens_as_are_accepted(page_size: int) -> None:
    traffic = Traffic(400, page_size=page_size, depth=1, chunk=128)
    states = [traffic.submit([i + 1] * 9, 12, stream=i > 0) for i in range(3)]
    plan = answering(traffic, *states)
    known = traffic.rows.num_known[plan.rows]
    truth = {state: expected(state.request.input_ids, 4)[1:] for state in states}
    runs = {state: (truth[state][:n] + [7] * (3 - n), n) for n, state in enumerate(states, start=1)}
    outcome = traffic.scheduler.resolve(*verify_drafts(traffic, plan, runs))

    rows = traffic.rows
    assert (rows.num_known[plan.rows] - known).tolist() == [1, 2, 3]
    assert np.array_equal(rows.num_tokens[plan.rows], rows.num_known[plan.rows])
    assert np.array_equal(rows.num_computed[plan.rows], rows.num_known[plan.rows] - 1)
    assert np.array_equal(traffic.scheduler.held.num_slots[plan.rows], rows.num_computed[plan.rows])
    assert outcome.states == [states[1]] * 2 + [states[2]] * 3
    assert outcome.token_ids == truth[states[1]][:2] + truth[states[2]]
    assert outcome.samples.tolist() == [1, 1, 2, 2, 2]
    assert (outcome.num_tokens, outcome.finished) == (6, [])
    traffic.check_pages()
    traffic.run_all()
    assert all(state.output_ids == expected(state.request.input_ids, 12) for state in states)


@pytest.mark.parametrize(
    ("fields", "tokens", "num_accepted", "answer", "reason"),
    [
        ({}, [5, EOS, 6], 3, [5, EOS], FinishReason("stop", matched=EOS)),
        ({"ignore_eos": True, "max_new_tokens": 4}, [5, EOS, 6], 3, [5, EOS, 6], FinishReason("length")),
        ({"max_new_tokens": 3}, [5, 6, 7], 3, [5, 6], FinishReason("length")),
        ({"max_new_tokens": 2}, [5, 6, 7], 3, [5], FinishReason("length")),
        ({"stop_token_ids": [6]}, [5, 6, 7], 3, [5, 6], FinishReason("stop", matched=6)),
        ({"stop_token_ids": [6]}, [5, 6, 7], 1, [5], None),
        ({}, [5, -1, 6], 3, [5], "the model's output is not finite"),
        ({}, [5, EOS, 6], 1, [5], None),
    ],
)
def test_an_answer_ends_inside_of_what_is_accepted(
    fields: dict[str, Any], tokens: list[int], num_accepted: int, answer: list[int], reason: FinishReason | str | None
) -> None:
    traffic = Traffic(64, depth=1)
    state = traffic.submit([3] * 6, stream=True, **{"max_new_tokens": 9, **fields})
    first = expected([3] * 6, 1)
    plan = answering(traffic, state)
    outcome = traffic.scheduler.resolve(*verify_drafts(traffic, plan, {state: (tokens, num_accepted)}))
    assert outcome.token_ids == answer
    assert traffic.rows.output_ids(state) == first + answer
    assert outcome.finished == ([] if reason is None else [state])
    if isinstance(reason, str):
        assert state.finish_reason is not None and reason in (state.finish_reason.message or "")
    else:
        assert state.finish_reason == reason
    traffic.check_pages()


class CountingMatcher:
    """Stands in for a matcher: forces `forced` behind token `forces_at` of the answer, and ends it with `ends_at`."""

    may_jump, masks = True, False

    def __init__(self, forces_at: int = -1, forced: tuple[int, ...] = (), ends_at: int = -1) -> None:
        self.forces_at, self.forced, self.ends_at = forces_at, list(forced), ends_at
        self.seen: list[int] = []

    @property
    def is_finished(self) -> bool:
        return len(self.seen) == self.ends_at

    def advance(self, token: int) -> None:
        self.seen.append(token)

    def jump(self, max_tokens: int) -> list[int]:
        return self.forced[:max_tokens] if len(self.seen) == self.forces_at else []


def test_a_matcher_follows_each_accepted_token_and_forces_what_comes_behind_them() -> None:
    traffic = Traffic(64, depth=1)
    state = traffic.submit([3] * 6, 10, stream=True)
    matcher = CountingMatcher(forces_at=3, forced=(8, 9))
    state.matcher = matcher  # type: ignore[assignment]
    first, second, third = expected([3] * 6, 3)
    plan = answering(traffic, state)
    outcome = traffic.scheduler.resolve(*verify_drafts(traffic, plan, {state: ([second, third, 1], 2)}))
    assert matcher.seen == [first, second, third]
    assert (outcome.token_ids, outcome.forced, outcome.num_tokens) == ([second, third], [(state, [8, 9])], 4)
    traffic.run_all()
    start = [first, second, third, 8, 9]
    assert state.output_ids == start + expected([3] * 6 + start, 5)


def test_a_matcher_that_comes_to_its_end_drops_what_was_accepted_behind_it() -> None:
    traffic = Traffic(64, depth=1)
    state = traffic.submit([3] * 6, 10)
    state.matcher = CountingMatcher(ends_at=2)  # type: ignore[assignment]
    first, second, third, fourth = expected([3] * 6, 4)
    plan = answering(traffic, state)
    outcome = traffic.scheduler.resolve(*verify_drafts(traffic, plan, {state: ([second, third, fourth], 3)}))
    assert outcome.finished == [state] and state.output_ids == [first, second]
    assert state.finish_reason == FinishReason("stop") and outcome.num_tokens == 1
    traffic.check_pages()


def test_tokens_of_a_request_that_has_ended_meanwhile_are_dropped_however_many() -> None:
    traffic = Traffic(64, depth=1)
    gone, stays = traffic.submit([3] * 6, 10), traffic.submit([4] * 6, 10)
    plan = answering(traffic, gone, stays)
    truth = expected([4] * 6, 4)[1:]
    step = verify_drafts(traffic, plan, {gone: ([5, 5, 5], 3), stays: (truth, 3)})
    traffic.scheduler.finish(gone, FinishReason("abort"))
    assert traffic.scheduler.resolve(*step).num_tokens == 3
    traffic.run_all()
    assert len(gone.output_ids) == 1 and stays.output_ids == expected([4] * 6, 10)


# ---- the books ----


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda held: held.allocator.allocate(3), "3 of 64 KV slots are neither free, cached nor held"),
        (lambda held: held.allocator.free(held.cache.slots()[:2]), "2 of 64 KV slots are counted twice"),
        (
            lambda held: held.cache.lock(held.cache.match(np.array([4] * 8, np.int32)).node),
            "8 cached tokens are locked",
        ),
        (lambda held: held.num_slots.__setitem__(2, 5), "1 rows hold KV slots, and no request runs in them"),
    ],
)
@pytest.mark.breaks_bookkeeping
def test_a_broken_account_of_pages_and_locks_is_seen(damage: Callable[[Holdings], object], message: str) -> None:
    traffic = Traffic(64)
    traffic.submit([4] * 8, 3)
    traffic.run_all()
    assert traffic.scheduler.violations() == []
    damage(traffic.scheduler.held)
    assert any(message in violation for violation in traffic.scheduler.violations())
    with pytest.raises(AssertionError):
        traffic.scheduler.check()


@pytest.mark.breaks_bookkeeping
def test_a_row_that_nobody_runs_in_and_a_lock_too_many_are_seen() -> None:
    traffic = Traffic(64)
    running = traffic.submit([4] * 8, 30)
    traffic.step()
    traffic.check_pages()
    traffic.cache.lock(traffic.scheduler.held.nodes[running.row])
    with pytest.raises(AssertionError, match="2 locks, 1 requests"):
        traffic.scheduler.check()
    traffic.cache.unlock(traffic.scheduler.held.nodes[running.row])
    traffic.rows.allocate(RequestState(Request("stray", [1], SamplingParams(max_new_tokens=1, sampling_seed=0))))
    assert traffic.scheduler.violations() == ["2 rows are taken, and 1 requests run"]

"""Layers that see a window hold no more: the tree and the scheduler with two pools, against models of both."""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bench.windows import MODELS, context_bytes
from cache.allocator import PageAllocator
from cache.layout import KV
from cache.radix import Node
from cache.window import WindowSlots
from cache.window_radix import WindowRadixCache
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.schedule.window_holdings import WindowHoldings, least_len
from engine.state import RequestState
from engine.step.memory import GIB
from engine.step.window_memory import KVSplit
from tests.test_radix import token_lists
from tests.test_scheduler import Traffic, assert_answers, expected, play

WINDOW = 10


class WindowMachine(RuleBasedStateMachine):
    """The model: each cached page by the prefix that ends with it, its slots, and whether it has a window page."""

    @initialize(page_size=st.sampled_from([1, 2, 4]), window=st.sampled_from([1, 3, 5]))
    def start(self, page_size: int, window: int) -> None:
        self.page_size, self.window = page_size, window
        self.allocator = PageAllocator(1 + 48 // page_size, page_size)
        self.windows = WindowSlots(self.allocator.num_pages, 1 + 28 // page_size, page_size, window)
        self.cache = WindowRadixCache(page_size, window)
        self.slots: dict[tuple[int, ...], list[int]] = {}
        self.has_window: dict[tuple[int, ...], bool] = {}
        self.locks: list[tuple[tuple[int, ...], int, Node]] = []  # (tokens, the first one whose window is locked, node)

    def pages(self, tokens: tuple[int, ...], first: int = 0) -> list[tuple[int, ...]]:
        """Return the pages of tokens[first:]."""
        first -= first % self.page_size
        return [tokens[:end] for end in range(first + self.page_size, len(tokens) + 1, self.page_size)]

    def num_whole(self, tokens: tuple[int, ...]) -> int:
        return max(
            d for d in range(0, len(tokens) + 1, self.page_size)
            if all(self.has_window[page] for page in self.pages(tokens[:d], max(d - self.window, 0)))
        )  # fmt: skip

    @rule(tokens=token_lists, keeps_lock=st.booleans())
    def compute(self, tokens: list[int], keeps_lock: bool) -> None:
        """Go on behind what is whole, as a request does that ends, or goes on, with its lock."""
        known = tuple(tokens[: len(tokens) // self.page_size * self.page_size])
        ids = np.array(known, np.int32)
        cached = [page for page in self.pages(known) if page in self.slots]
        whole = self.num_whole(cached[-1] if cached else ())
        assert self.cache.match_len(ids) == whole
        match = self.cache.match(ids)
        assert (len(match.slots), match.num_whole) == (len(cached) * self.page_size, whole)
        for limit in range(len(match.slots) + 1):
            end = limit - limit % self.page_size
            assert self.cache.whole_len(match.node, limit) == self.num_whole(known[:end])
        new = self.allocator.allocate((len(known) - len(match.slots)) // self.page_size)
        if new is None:
            return
        slots = np.concatenate([match.slots, new])
        lacking = self.windows.lacking(slots[whole:])
        if len(lacking) * self.page_size > self.windows.num_free:
            self.allocator.free(new)
            return
        self.windows.give(lacking)
        _, node = self.cache.insert(ids, slots)
        self.cache.mark_window(node, whole, len(known))
        for i, page in enumerate(self.pages(known)):
            self.slots[page] = slots[i * self.page_size : (i + 1) * self.page_size].tolist()
            self.has_window[page] = self.has_window.get(page, False) or len(page) > whole
        if keeps_lock and known:
            self.cache.lock(node)
            self.cache.lock_window(node, whole + 1 - self.window, len(known))
            self.locks.append((known, max(whole + 1 - self.window, 0), node))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        tokens, first, node = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.cache.unlock_window(node, first, len(tokens))
        self.cache.unlock(node)

    @rule(num_tokens=st.integers(1, 8))
    def evict(self, num_tokens: int) -> None:
        freed = self.cache.evict(num_tokens)
        for page in self.pages_of(freed):
            del self.slots[page], self.has_window[page]
        self.windows.free(freed)
        self.allocator.free(freed)

    @rule(num_tokens=st.integers(1, 8))
    def evict_window(self, num_tokens: int) -> None:
        num_evictable = self.cache.num_window_evictable
        freed = self.cache.evict_window(num_tokens)
        assert len(freed) >= min(num_tokens, num_evictable)
        for page in self.pages_of(freed):
            assert self.has_window[page]
            self.has_window[page] = False
        self.windows.free(freed)

    def pages_of(self, slots: np.ndarray) -> list[tuple[int, ...]]:
        freed = set(slots.tolist())
        return [page for page, its in self.slots.items() if freed & set(its)]

    @invariant()
    def both_pools_are_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        self.allocator.check(self.cache.slots())
        self.windows.check(self.cache.window_held())
        held = sorted(slot for page, slots in self.slots.items() if self.has_window[page] for slot in slots)
        assert sorted(self.cache.window_held().tolist()) == held
        locked = {page for tokens, first, _ in self.locks for page in self.pages(tokens, first)}
        assert all(self.has_window[page] for page in locked)
        assert self.cache.num_window_locked == len(locked) * self.page_size


TestWindowMachine = WindowMachine.TestCase
TestWindowMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def fill(cache: WindowRadixCache, tokens: np.ndarray, first_slot: int) -> Node:
    """Insert `tokens` with slots first_slot, first_slot + 1, ..., all with windows."""
    _, node = cache.insert(tokens, np.arange(first_slot, first_slot + len(tokens), dtype=np.int32))
    cache.mark_window(node, 0, len(tokens))
    return node


def test_a_match_ends_where_the_last_window_is_whole() -> None:
    cache = WindowRadixCache(1, window=2)
    node = fill(cache, ids(1, 2, 3, 4, 5, 6), 10)
    cache.lock(node)
    cache.lock_window(node, 4, 6)
    assert cache.evict_window(9).tolist() == [10, 11, 12, 13]
    assert cache.match(ids(1, 2, 3, 4, 5, 6, 7)).num_whole == 6
    assert cache.match(ids(1, 2, 3, 4, 5, 9)).num_whole == 0
    assert len(cache.match(ids(1, 2, 3, 4, 5, 9)).slots) == 5


def test_windows_of_what_was_used_longest_ago_go_first_and_of_a_prompt_its_beginning() -> None:
    cache = WindowRadixCache(1, window=1)
    for first, slot in ((1, 10), (2, 20)):
        fill(cache, ids(first, 7), slot)
        cache.match(ids(first))  # cuts it in two
    for first in (2, 1):
        cache.match(ids(first, 7))
    assert [cache.evict_window(1).tolist() for _ in range(5)] == [[20], [21], [10], [11], []]
    assert cache.num_cached == 4


def windowed(num_tokens: int, num_window_tokens: int = 0, page_size: int = 1, **options: object) -> Traffic:
    """Return traffic with a pool of windows that is as small as one may be, or of `num_window_tokens`."""
    least = least_len(WINDOW, page_size) + 2 * page_size
    num_window_tokens = num_window_tokens or least + -least % page_size
    return Traffic(num_tokens, page_size=page_size, window=WINDOW, num_window_tokens=num_window_tokens, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("cached", [True, False])
def test_every_answer_is_the_one_it_would_get_alone(page_size: int, chunk: int, cached: bool) -> None:
    rng = random.Random(page_size * 100 + chunk)
    traffic = windowed(600, 120, num_rows=6, page_size=page_size, chunk=chunk, cached=cached)
    assert_answers(play(traffic, rng, 50, head_lens=[40] * 3, most_tail=60, most_new=80, most_steps=12))


@pytest.mark.parametrize("seed", range(8))
def test_answers_survive_a_pool_of_windows_that_runs_out_again_and_again(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)
    rng = random.Random(seed)
    page_size = rng.choice([1, 1, 4])
    num_tokens = rng.choice([160, 1000])
    traffic = windowed(num_tokens, num_rows=rng.choice([3, 6]), chunk=rng.choice([3, 9, 40]), page_size=page_size,
                       conservativeness=0.0, cached=seed % 4 != 0)  # fmt: skip
    assert_answers(play(traffic, rng, 70, head_lens=[12, 40], most_tail=30, most_new=70, most_steps=8, abort_share=0.1))
    assert traffic.scheduler.num_retractions > 0


def test_a_long_answer_holds_its_window_only() -> None:
    traffic = windowed(2000, 400, chunk=64)
    traffic.submit([5] * 300, max_new_tokens=500)
    most = 0
    while traffic.step() is not None:
        stats = traffic.scheduler.stats()
        if stats.num_running and stats.num_held_tokens > 400:
            most = max(most, stats.num_held_window_tokens)
    assert 0 < most <= least_len(WINDOW, 1)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("start", [6, 32, 40])
def test_of_an_adopted_prefix_what_the_next_step_sees_is_locked_until_the_row_ends(page_size: int, start: int) -> None:
    traffic = windowed(200, 120, page_size=page_size)
    held, cache, prefix = traffic.scheduler.held, traffic.cache, np.arange(1, 41, dtype=np.int32)
    assert isinstance(held, WindowHoldings) and isinstance(cache, WindowRadixCache)
    slots = traffic.allocator.allocate(40 // page_size)
    assert slots is not None
    held.windows.give(held.windows.lacking(slots))
    cache.mark_window(cache.insert(prefix, slots)[1], 0, 40)
    match = cache.match(prefix)
    cache.lock(match.node)
    held.start(1, match.node, num_shared=0)
    held.adopt(1, match, start)
    seen = slice(max(start + 1 - WINDOW, 0) // page_size * page_size, -(-start // page_size) * page_size)
    freed = cache.evict_window(1000)
    assert sorted(freed.tolist()) == sorted({*slots.tolist()} - {*slots[seen].tolist()})
    held.windows.free(freed)
    state = RequestState(Request("r", prefix.tolist(), SamplingParams()))
    state.row = 1
    held.release(state, keep=False)
    freed = cache.evict_window(1000)
    assert sorted(freed.tolist()) == slots[seen].tolist()
    held.windows.free(freed)


@pytest.mark.parametrize("num_answer_tokens", [3, 60])
def test_a_second_turn_computes_only_what_is_new(num_answer_tokens: int) -> None:
    traffic = windowed(2000, 240, chunk=64)
    first = traffic.submit([*range(1, 150)], num_answer_tokens)
    traffic.run_all()
    traffic.submit([7] * 100, 40)  # whose windows take the room of the first one's older ones
    traffic.run_all()
    before = traffic.computed_tokens
    second = traffic.submit([*first.request.input_ids, *first.output_ids, 8, 9], 1)
    traffic.run_all()
    assert traffic.computed_tokens - before == 3  # the last token of an answer is not computed before
    assert second.num_cached_tokens == 149 + num_answer_tokens - 1


def test_a_prompt_that_branches_off_where_windows_are_gone_is_computed_again_in_the_slots_it_has() -> None:
    traffic = windowed(2000, 150, chunk=64)
    prompt = [*range(1, 200)]
    traffic.submit(prompt, 1)
    traffic.run_all()
    num_cached = traffic.cache.num_cached
    branch = traffic.submit([*prompt[:40], 500, 501], 3)
    traffic.run_all()
    assert branch.output_ids == expected(branch.request.input_ids, 3)
    assert branch.num_cached_tokens == 0
    assert traffic.cache.num_cached == num_cached + 2 + 2
    again = traffic.submit([*prompt[:40], 500, 501], 1)
    traffic.run_all()
    assert again.num_cached_tokens == 41


@pytest.mark.parametrize(
    ("model", "without", "with_windows"), [("Gemma 3 27B", 15.5, 2.93), ("gpt-oss-20b", 1.5, 0.75)]
)
def test_a_context_takes_what_its_full_layers_hold_and_a_window(
    model: str, without: float, with_windows: float
) -> None:
    found = context_bytes(MODELS[model], 32768)
    assert [round(num_bytes / GIB, 2) for num_bytes in found] == [without, with_windows]


@pytest.mark.parametrize("ratio", [None, 0.1, 0.8])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("full_bytes", [0, 80])
def test_both_pools_fit_into_the_memory_and_would_not_with_a_page_more(
    ratio: float | None, page_size: int, full_bytes: int
) -> None:
    config = EngineConfig(
        swa_full_tokens_ratio=ratio, page_size=page_size, max_running_requests=4, chunked_prefill_size=64
    )
    layout = [KV(1, 20, window=500)] * 3 + [KV(1, full_bytes // 4)] * (full_bytes > 0)
    split = KVSplit.of(config, 100_000, layout, torch.bfloat16, has_window_slots=True)
    assert (split.full_bytes, split.window_bytes) == (full_bytes, 240)
    for room in (10_000, 200_000, 3_000_000):
        num_tokens = split.num_tokens(room, most=400_000)
        assert split.num_bytes(num_tokens) <= room
        assert num_tokens == 400_000 or split.num_bytes(num_tokens + page_size) > room
        num_window_tokens = split.num_window_tokens(num_tokens)
        assert num_window_tokens <= num_tokens
        if ratio is not None and num_tokens > 10_000:
            assert abs(num_window_tokens - ratio * num_tokens) <= page_size


@pytest.mark.breaks_bookkeeping
def test_slots_that_nobody_accounts_for_are_reported_of_either_pool() -> None:
    traffic = windowed(64, 120)
    traffic.submit([4] * 8, 3)
    traffic.run_all()
    assert traffic.windows is not None
    traffic.windows.give(ids(60, 61))
    assert traffic.scheduler.violations() == ["2 of 120 window slots are neither free, cached nor held"]

"""RadixCache, on a real PageAllocator, against a dict of pages."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.allocator import PageAllocator
from cache.radix import NoCache, Node, RadixCache

PagePath = tuple[str, tuple[int, ...]]  # extra key, all tokens up to the end of a page

# Prompts follow one text up to anywhere (between nodes, inside a node, inside a page) and then go their own ways.
TEXT = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1]
token_lists = st.builds(
    lambda num_shared, rest: TEXT[:num_shared] + rest,
    st.sampled_from(range(len(TEXT), -1, -1)),
    st.lists(st.integers(0, 2), max_size=4),
)
extra_keys = st.sampled_from(["", "", "lora"])


@dataclass
class CachedPage:
    slots: list[int]
    last_access: int


class RadixMachine(RuleBasedStateMachine):
    """The model: each cached page by the whole prefix that ends with it, and the list of locked prefixes."""

    @initialize(page_size=st.sampled_from([1, 2, 4]))
    def start(self, page_size: int) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages=1 + 48 // page_size, page_size=page_size)
        self.cache = RadixCache(page_size)
        self.pages: dict[PagePath, CachedPage] = {}
        self.locks: list[tuple[PagePath, Node]] = []
        self.now = 0

    def page_paths(self, tokens: list[int], extra_key: str) -> list[PagePath]:
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [(extra_key, tuple(tokens[:end])) for end in ends]

    def cached_paths(self, tokens: list[int], extra_key: str) -> list[PagePath]:
        paths = self.page_paths(tokens, extra_key)
        return paths[: next((i for i, path in enumerate(paths) if path not in self.pages), len(paths))]

    def locked_paths(self) -> set[PagePath]:
        return {page for (key, tokens), _ in self.locks for page in self.page_paths(list(tokens), key)}

    def unlocked_leaves(self) -> list[PagePath]:
        inner = {(key, tokens[: -self.page_size]) for key, tokens in self.pages}
        return [path for path in self.pages.keys() - inner if path not in self.locked_paths()]

    def touch(self, paths: list[PagePath]) -> None:
        self.now += 1
        for path in paths:
            self.pages[path].last_access = self.now

    @rule(tokens=token_lists, extra_key=extra_keys, lock=st.booleans())
    def match(self, tokens: list[int], extra_key: str, lock: bool) -> None:
        expected = self.cached_paths(tokens, extra_key)
        ids = np.array(tokens, dtype=np.int32)
        assert self.cache.match_len(ids, extra_key) == len(expected) * self.page_size
        match = self.cache.match(ids, extra_key)
        assert match.slots.tolist() == [slot for path in expected for slot in self.pages[path].slots]
        assert match.slots.dtype == np.int32
        assert match.node.depth_tokens == len(match.slots)
        self.touch(expected)
        self.cache.hit(match.node)
        if lock:
            self.lock(tokens[: len(match.slots)], extra_key, match.node)

    @rule(tokens=token_lists, extra_key=extra_keys, lock=st.booleans())
    def insert(self, tokens: list[int], extra_key: str, lock: bool) -> None:
        slots = self.allocator.extend(0, -1, len(tokens))
        if slots is None:
            return
        existing = self.cached_paths(tokens, extra_key)
        num_existing, node = self.cache.insert(np.array(tokens, dtype=np.int32), slots, extra_key)
        assert num_existing == len(existing) * self.page_size
        paths = self.page_paths(tokens, extra_key)
        num_whole = len(paths) * self.page_size
        assert node.depth_tokens == num_whole
        for path in paths[len(existing) :]:
            end = len(path[1])
            self.pages[path] = CachedPage(slots[end - self.page_size : end].tolist(), 0)
        self.touch(paths)
        self.allocator.free(np.concatenate((slots[:num_existing], slots[num_whole:])))
        slots[:] = -1  # the tree must have copied them
        if lock:
            self.lock(tokens[:num_whole], extra_key, node)

    def lock(self, tokens: list[int], extra_key: str, node: Node) -> None:
        self.cache.lock(node)
        self.locks.append(((extra_key, tuple(tokens)), node))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        _, node = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.cache.unlock(node)

    @rule(num_tokens=st.integers(0, 8))
    def evict(self, num_tokens: int) -> None:
        self.remove(self.cache.evict(num_tokens), num_tokens)

    def teardown(self) -> None:
        """Without locks, reset gives everything back."""
        if not hasattr(self, "cache"):
            return
        for _, node in self.locks:
            self.cache.unlock(node)
        self.locks.clear()
        self.remove(self.cache.reset(), len(self.pages) * self.page_size)
        assert not self.pages
        assert self.cache.num_cached == 0
        assert self.allocator.num_free == self.allocator.num_total

    def remove(self, freed: np.ndarray, num_wanted: int) -> None:
        num_evictable = len(self.pages.keys() - self.locked_paths()) * self.page_size
        assert len(freed) >= min(num_wanted, num_evictable)
        freed_slots = set(freed.tolist())
        gone = [path for path, page in self.pages.items() if freed_slots & set(page.slots)]
        assert sum(len(self.pages[path].slots) for path in gone) == len(freed) == len(freed_slots)
        assert not self.locked_paths() & set(gone)
        newest_gone = max((self.pages[path].last_access for path in gone), default=0)
        for path in gone:
            del self.pages[path]
        assert all(self.pages[path].last_access >= newest_gone for path in self.unlocked_leaves())
        self.allocator.free(freed)

    @invariant()
    def the_tree_is_sound(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()

    @invariant()
    def the_tree_holds_the_models_pages(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert sorted(self.cache.slots().tolist()) == sorted(s for page in self.pages.values() for s in page.slots)
        num_locked = len(self.locked_paths()) * self.page_size
        assert self.cache.num_locked == num_locked
        assert self.cache.num_evictable == len(self.pages) * self.page_size - num_locked
        assert self.cache.stats().num_cached == self.cache.num_cached == len(self.pages) * self.page_size

    @invariant()
    def free_plus_cached_pages_are_all_pages(self) -> None:
        if hasattr(self, "cache"):
            self.allocator.check(self.cache.slots())


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def fill(cache: RadixCache, ids: np.ndarray, first_slot: int, extra_key: str = "") -> Node:
    """Insert `ids` with slots first_slot, first_slot + 1, ..."""
    return cache.insert(ids, np.arange(first_slot, first_slot + len(ids), dtype=np.int32), extra_key)[1]


def test_a_locked_prefix_survives_eviction() -> None:
    cache = RadixCache(1)
    fill(cache, tokens(1, 2, 3, 4), 10)
    prefix = cache.match(tokens(1, 2)).node
    cache.lock(prefix)
    assert sorted(cache.evict(100).tolist()) == [12, 13]
    assert cache.match(tokens(1, 2, 3, 4)).slots.tolist() == [10, 11]
    cache.unlock(prefix)
    assert sorted(cache.evict(100).tolist()) == [10, 11]


def test_a_match_inside_a_node_splits_it() -> None:
    cache = RadixCache(1)
    lower = fill(cache, tokens(1, 2, 3, 4), 10)
    match = cache.match(tokens(1, 2, 9))
    assert match.slots.tolist() == [10, 11]
    assert match.node.depth_tokens == 2
    assert lower.parent is match.node
    assert lower.token_ids.tolist() == [3, 4]
    assert lower.depth_tokens == 4
    cache.check()


def test_a_lock_taken_before_a_split_holds_the_whole_prefix() -> None:
    cache = RadixCache(1)
    node = fill(cache, tokens(1, 2, 3, 4), 10)
    cache.lock(node)
    cache.match(tokens(1, 2))
    assert len(cache.evict(100)) == 0
    cache.unlock(node)
    assert cache.num_evictable == 4
    assert cache.num_locked == 0


def test_match_len_changes_nothing() -> None:
    cache = RadixCache(1)
    fill(cache, tokens(1, 2, 3, 4), 10)
    before = cache.stats()
    assert cache.match_len(tokens(1, 2, 9)) == 2
    assert cache.stats() == before


def test_keys_with_different_extra_key_never_share() -> None:
    cache = RadixCache(1)
    a = fill(cache, tokens(1, 2, 3), 10, "a")
    b = fill(cache, tokens(1, 2, 3), 20, "b")
    assert cache.match(tokens(1, 2, 3)).node is cache.root
    assert cache.match(tokens(1, 2, 3), "b").slots.tolist() == [20, 21, 22]
    assert not set(cache.path(a)) & set(cache.path(b))


def test_page_size_4_shares_whole_pages_only() -> None:
    cache = RadixCache(4)
    ids = np.arange(10, dtype=np.int32)
    node = fill(cache, ids, 40)
    assert node.depth_tokens == 8
    assert cache.match(ids[:7]).slots.tolist() == [40, 41, 42, 43]
    other = ids.copy()
    other[6] = 99
    assert fill(cache, other, 80).depth_tokens == 8
    assert cache.match(other).slots.tolist() == [40, 41, 42, 43, 84, 85, 86, 87]
    cache.check()


def test_a_match_that_ends_inside_a_page_splits_before_it() -> None:
    cache = RadixCache(2)
    fill(cache, tokens(1, 2, 3, 4), 10)
    assert cache.match(tokens(1, 2, 3, 9)).slots.tolist() == [10, 11]
    cache.check()


def test_the_least_recently_used_leaf_is_evicted_first() -> None:
    cache = RadixCache(1)
    for first, slot in ((1, 10), (2, 20), (3, 30)):
        fill(cache, tokens(first, 7), slot)
    cache.match(tokens(1, 7))
    assert cache.evict(1).tolist() == [20, 21]
    assert cache.evict(1).tolist() == [30, 31]
    assert cache.evict(1).tolist() == [10, 11]


def test_a_parent_is_evicted_only_after_its_children() -> None:
    cache = RadixCache(1)
    fill(cache, tokens(1, 2, 3), 10)
    fill(cache, tokens(1, 2, 4), 20)
    assert cache.evict(3).tolist() == [12, 22, 10, 11]


def test_insert_leaves_the_caller_its_duplicates_and_its_unfinished_page() -> None:
    cache = RadixCache(2)
    fill(cache, tokens(1, 2), 10)
    num_existing, node = cache.insert(tokens(1, 2, 3, 4, 5), np.arange(20, 25, dtype=np.int32))
    assert num_existing == 2
    assert node.slots.tolist() == [22, 23]
    assert sorted(cache.slots().tolist()) == [10, 11, 22, 23]


def test_locking_an_evicted_node_raises() -> None:
    cache = RadixCache(1)
    node = fill(cache, tokens(1, 2), 10)
    cache.evict(2)
    with pytest.raises(AssertionError, match="evicted after its match"):
        cache.lock(node)


def test_unlocking_more_often_than_locking_raises() -> None:
    cache = RadixCache(1)
    with pytest.raises(AssertionError, match="more often"):
        cache.unlock(fill(cache, tokens(1, 2), 10))


def test_reset_refuses_while_anything_is_locked() -> None:
    cache = RadixCache(1)
    cache.lock(fill(cache, tokens(1, 2), 10))
    with pytest.raises(AssertionError, match="2 tokens are locked"):
        cache.reset()


def test_the_path_to_the_root_has_no_root() -> None:
    cache = RadixCache(1)
    fill(cache, tokens(1, 2, 3), 10)
    node = fill(cache, tokens(1, 2, 4), 20)
    assert [step.depth_tokens for step in cache.path(node)] == [3, 2]
    assert list(cache.path(cache.root)) == []


def test_top_prefixes_come_by_hits_and_as_far_as_their_hits_went() -> None:
    cache = RadixCache(1)
    fill(cache, tokens(1, 2, 3), 10)
    fill(cache, tokens(1, 2, 4), 20)
    cache.lock(fill(cache, tokens(5, 6), 30))
    for ids in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (5, 6)):
        cache.hit(cache.match(tokens(*ids)).node)
    top = [(p.token_ids.tolist(), p.num_tokens, p.lock_ref, p.hits) for p in cache.top_prefixes(3, head_len=2)]
    assert top[:2] == [([1, 2], 2, 0, 3), ([1, 2], 3, 0, 2)]
    assert cache.top_prefixes(10)[-1].hits == 1
    assert len(cache.top_prefixes(10)) == 4


def test_hit_rate_counts_tokens() -> None:
    cache = RadixCache(1)
    fill(cache, tokens(1, 2, 3), 10)
    cache.match(tokens(1, 2, 3, 4))
    assert cache.stats().hit_rate == 0.75


def test_no_cache_takes_nothing_and_matches_nothing() -> None:
    cache = NoCache(1)
    assert cache.insert(tokens(1, 2), tokens(10, 11)) == (2, cache.root)
    match = cache.match(tokens(1, 2))
    cache.lock(match.node)
    cache.unlock(match.node)
    assert len(match.slots) == len(cache.evict(10)) == len(cache.reset()) == cache.num_cached == 0

"""The radix tree of a model some of whose layers see a window: its nodes may lack what those layers kept.

Of a node's tokens the last `num_window` still have their slots in the window pool (`cache.window`). A request can go on
behind a prefix only where all of its last `window` tokens have theirs, so a match says how far that is; the full slots
beyond are still worth having: a request that computes those tokens again writes to them, and they are whole once more.

Window slots have a least recently used order of their own. Any node may lose them, above others too; of nodes that were
used together the one nearest to the root goes first, since prompts are taken up again at their end. What running
requests see is locked, and locks begin and end where nodes do.
"""

import heapq
from collections.abc import Hashable, Iterable
from typing import Optional

import numpy as np

from cache.radix import NO_SLOTS, Match, Node, RadixCache


class WindowNode(Node):
    """A node that knows which of its tokens have window slots."""

    __slots__ = ("in_window_heap", "num_window", "window_lock_ref")

    def __init__(self, parent: Optional["Node"], key: Hashable, data: bytes, slots: np.ndarray) -> None:
        super().__init__(parent, key, data, slots)
        self.num_window = 0  # of its tokens, the last ones: whole pages
        self.window_lock_ref = 0  # while it is not 0, all of its tokens have window slots
        self.in_window_heap = False


class WindowRadixCache(RadixCache):
    """A `RadixCache` whose prefixes may be whole, or not, for layers that see the last `window` tokens."""

    node_class = WindowNode

    def __init__(self, page_size: int, window: int) -> None:
        super().__init__(page_size)
        self.window = window
        self.num_window_evictable = 0
        self.num_window_locked = 0
        # Every unlocked node with window slots is in the heap, once, as the leaves are in the other one.
        self._window_heap: list[tuple[int, int, int, WindowNode]] = []

    def new_empty(self) -> "WindowRadixCache":
        return WindowRadixCache(self.page_size, self.window)

    def match(self, token_ids: np.ndarray, extra_key: str = "") -> Match:
        """Return the longest cached prefix, and how much of it is whole."""
        found = super().match(token_ids, extra_key)
        num_whole = self.whole_len(found.node, found.num_whole)
        self._num_hit_tokens -= found.num_whole - num_whole
        return found._replace(num_whole=num_whole)

    def match_len(self, token_ids: np.ndarray, extra_key: str = "") -> int:
        """Return how much of the prefix that `match` would find is whole. Changes nothing."""
        path, num_tokens = self._walk(self._whole_pages(token_ids), extra_key)
        return self._whole_len(path, num_tokens)

    def whole_len(self, node: Node, limit: int) -> int:
        """Return the longest prefix, whole pages, of the one that ends at `node` that is whole. limit: its tokens."""
        return self._whole_len(list(self.path(node))[::-1], min(limit, node.depth_tokens))

    def _whole_len(self, path: Iterable[Node], limit: int) -> int:
        """Do `whole_len` for the nodes of a prefix, from the root on."""
        limit -= limit % self.page_size
        num_whole = first = 0  # all tokens from `first` to the end of a node have window slots
        for node in path:
            assert isinstance(node, WindowNode)
            if node.num_window < len(node.slots):
                first = node.depth_tokens - node.num_window
            end = min(node.depth_tokens, limit)
            if first == 0 or end - first >= self.window:
                num_whole = end
            if end == limit:
                break
        return num_whole

    def mark_window(self, node: Node, first: int, stop: int) -> None:
        """Note that the pages of tokens [first, stop) before the end of `node` have window slots.

        Those that the tree had not are its own now.
        """
        for step in self._span(node, first, stop):
            missing = len(step.slots) - step.num_window
            if missing:
                step.num_window += missing
                self.num_window_evictable += missing
                self._push_window(step)

    def lock_window(self, node: Node, first: int, stop: int) -> None:
        """Keep the window slots of the pages of tokens [first, stop) before the end of `node`.

        Until an `unlock_window` of the same; `node` must be locked meanwhile. All of them have their window slots.
        """
        for step in self._span(node, first, stop):
            if not step.window_lock_ref:
                self.num_window_evictable -= step.num_window
                self.num_window_locked += step.num_window
            step.window_lock_ref += 1

    def unlock_window(self, node: Node, first: int, stop: int) -> None:
        """Undo one `lock_window(node, first, stop)`."""
        for step in self._span(node, first, stop):
            assert step.window_lock_ref > 0, "unlocked more often than locked"
            step.window_lock_ref -= 1
            if not step.window_lock_ref:
                self.num_window_evictable += step.num_window
                self.num_window_locked -= step.num_window
                self._push_window(step)

    def evict_window(self, num_tokens: int) -> np.ndarray:
        """Drop window slots, least recently used nodes first, until `num_tokens` are freed or none is left.

        Returns the full slots (int32) of these tokens, which stay in the tree: their window slots are the caller's.
        """
        freed: list[np.ndarray] = []
        num_freed, heap = 0, self._window_heap
        while num_freed < num_tokens and heap:
            last_access, depth, serial, node = heap[0]
            if node.num_window and not node.window_lock_ref and node.last_access != last_access:
                heapq.heapreplace(heap, (node.last_access, depth, serial, node))
                continue
            heapq.heappop(heap)
            node.in_window_heap = False
            if node.window_lock_ref or not node.num_window:
                continue
            freed.append(node.slots[len(node.slots) - node.num_window :])
            num_freed += node.num_window
            node.num_window = 0
        self.num_window_evictable -= num_freed
        return np.concatenate(freed) if freed else NO_SLOTS

    def window_held(self) -> np.ndarray:
        """Return the full slots of all tokens with window slots. Linear in the tree: for tests and idle time."""
        nodes = [node for node in self.nodes() if isinstance(node, WindowNode)]
        return np.concatenate([NO_SLOTS, *(node.slots[len(node.slots) - node.num_window :] for node in nodes)])

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken. Linear in the tree: for tests and idle time."""
        super().check()
        num_evictable = num_locked = 0
        in_heap = {id(entry[-1]) for entry in self._window_heap}
        assert len(in_heap) == len(self._window_heap), "a node is in the heap of windows twice"
        for node in self.nodes():
            assert isinstance(node, WindowNode)
            assert 0 <= node.num_window <= len(node.slots)
            assert node.num_window % self.page_size == 0, f"a node with {node.num_window} window slots"
            assert 0 <= node.window_lock_ref <= node.lock_ref, "a window is locked, and its node is not"
            assert not node.window_lock_ref or node.num_window == len(node.slots), "a locked window has holes"
            assert node.in_window_heap == (id(node) in in_heap)
            if node.num_window and not node.window_lock_ref:
                assert node.in_window_heap, "window slots that evict_window() cannot find"
            num_evictable += 0 if node.window_lock_ref else node.num_window
            num_locked += node.num_window if node.window_lock_ref else 0
        assert (num_evictable, num_locked) == (self.num_window_evictable, self.num_window_locked)

    def _span(self, node: Node, first: int, stop: int) -> list[WindowNode]:
        """Return the nodes of the pages of tokens [first, stop) before the end of `node`; split those that go beyond.

        Later it is the same tokens, though perhaps more nodes: a part of a locked node is locked as the whole was.
        """
        first = max(first - first % self.page_size, 0)
        stop += -stop % self.page_size
        span: list[WindowNode] = []
        while node.parent is not None and node.depth_tokens > first:
            start = node.parent.depth_tokens
            if start < stop < node.depth_tokens:
                node = self._split(node, stop)
            if start < first:
                self._split(node, first)
            if start < stop:
                assert isinstance(node, WindowNode)
                span.append(node)
            assert node.parent is not None
            node = node.parent
        return span

    def _split(self, node: Node, depth_tokens: int) -> Node:
        upper = super()._split(node, depth_tokens)
        assert isinstance(upper, WindowNode) and isinstance(node, WindowNode)
        num_lower = min(node.num_window, len(node.slots))
        upper.num_window, node.num_window = node.num_window - num_lower, num_lower
        upper.window_lock_ref = node.window_lock_ref
        self._push_window(upper)
        return upper

    def _on_evicted(self, node: Node) -> None:
        assert isinstance(node, WindowNode) and not node.window_lock_ref
        self.num_window_evictable -= node.num_window
        node.num_window = 0

    def _push_window(self, node: WindowNode) -> None:
        if node.num_window and not node.window_lock_ref and not node.in_window_heap:
            node.in_window_heap = True
            entry = (node.last_access, node.depth_tokens, next(self._serial), node)
            heapq.heappush(self._window_heap, entry)

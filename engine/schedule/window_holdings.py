"""The slots of requests where some layers see a window: what has fallen behind it goes back to the smaller pool.

A step whose first token of a row is number q reads window slots of the tokens from q + 1 - window on. Steps run in
order, and store before they attend, so older ones can be had by the very step that is being planned.
"""

from typing import Final

import numpy as np

from cache.allocator import PageAllocator
from cache.radix import Match, Node, RadixCache
from cache.window import WindowSlots
from cache.window_radix import WindowRadixCache
from engine.schedule.holdings import Holdings
from engine.schedule.rows import Rows
from engine.state import RequestState

MARGIN = 32  # tokens kept beyond the window: drafts are rejected, and answers end, some tokens before what is computed
INTERVAL = 16  # steps between two looks at what decoding rows can give back


def row_len(window: int, page_size: int) -> int:
    """Return the most window slots that a row past its prompt has of its own, if each step computes one token."""
    return window + MARGIN + INTERVAL + 2 * page_size


def least_len(window: int, page_size: int) -> int:
    """Return the window slots that one request may need beside those of a chunk: its own, and the end of its prompt."""
    return row_len(window, page_size) + window + 2 * page_size


class WindowHoldings(Holdings):
    """`Holdings` in two pools.

    Of a row's own tokens, those from `window_starts` on have window slots: [window_starts, num_slots), whole pages. Of
    the tree's tokens, those that the row's next step sees are locked there, until its answer is longer than a window.
    """

    def __init__(self, rows: Rows, allocator: PageAllocator, cache: RadixCache, windows: WindowSlots) -> None:
        """cache: a `WindowRadixCache`, or a `NoCache`."""
        super().__init__(rows, allocator, cache)
        self.windows = windows
        self.window: Final = windows.window
        self.window_starts = np.zeros(rows.num_rows + 1, np.int64)
        self._locks: dict[int, tuple[Node, int, int]] = {}  # row -> what it has locked: see `lock_window`
        self._lock_ends = np.zeros(rows.num_rows + 1, np.int64)  # where that ends; 0: nowhere
        self._chunked: set[int] = set()  # rows whose lock is still that of their newest chunk
        self._num_steps_left = INTERVAL

    @property
    def _tree(self) -> WindowRadixCache:
        assert isinstance(self.cache, WindowRadixCache)
        return self.cache

    @property
    def num_window_evictable(self) -> int:
        """Window slots that the tree alone holds."""
        return self._tree.num_window_evictable if self.is_cached else 0

    @property
    def num_window_held(self) -> int:
        """Window slots of running requests: those locked in the tree, and those that rows have of their own."""
        num_pages = -(-self.num_slots // self.page_size)
        num_locked = self._tree.num_window_locked if self.is_cached else 0
        return num_locked + int((num_pages * self.page_size - self.window_starts).sum())

    def max_chunk(self, chunk: int) -> int:
        """Return the most tokens of one request, `chunk` at most, that surely find room in pools with nothing else."""
        if self.windows.num_total >= self.allocator.num_total:
            return chunk
        room = self.windows.num_total - least_len(self.window, self.page_size)
        assert room >= self.page_size, f"{self.windows.num_total} window slots for a window of {self.window}"
        return min(chunk, room)

    def move_on(self, decodes: np.ndarray) -> None:
        """Give back what no row's next step will see: of chunks at once, of decodes every so many steps."""
        for row in self._chunked:
            if (lock := self._locks.get(row)) is not None:
                node, _, stop = lock
                self._lock_window(row, node, int(self._rows.num_computed[row]) - self.window, stop)
        self._chunked.clear()
        self._num_steps_left -= 1
        if self._num_steps_left <= 0:
            self._num_steps_left = INTERVAL
            self._give_back_behind(decodes)

    def window_slots(self, slots: np.ndarray) -> np.ndarray:
        """Return the window slots (int32 [T]) of a step's `slots`."""
        return self.windows.slots_of(slots)

    def adopt(self, row: int, match: Match, start: int) -> None:
        """Take over a cached prefix, and keep what `start`, the first token that will be computed, sees of it."""
        super().adopt(row, match, start)
        self.window_starts[row] = max(self.window_starts[row], self.cached_lens[row])
        self._lock_window(row, self.nodes[row], start + 1 - self.window, start)

    def extend_each(self, decodes: np.ndarray, computed: np.ndarray) -> np.ndarray | None:
        """Allocate one slot for each of `decodes` in both pools, or none at all: see `Holdings.extend_each`."""
        starts_page = None if self.page_size == 1 else np.flatnonzero(computed % self.page_size == 0)
        if not self._make_room(len(decodes) if starts_page is None else len(starts_page)):
            return None
        slots = super().extend_each(decodes, computed)
        if slots is None:
            return None
        self.windows.give(slots if starts_page is None else slots[starts_page] // self.page_size)
        return slots

    def extend(self, row: int, start: int, stop: int) -> bool:
        """Allocate slots for the first `stop` tokens in both pools, or in none: see `Holdings.extend`.

        Cached tokens from `start` on that have lost their window slots get others.
        """
        page_size, slots = self.page_size, self._rows.slots[row]
        behind = self._first_seen(start)
        if behind > self.window_starts[row]:
            self.windows.free(slots[self.window_starts[row] : behind])
            self.window_starts[row] = behind
        first = start - start % page_size
        # All of them, though cached ones may have theirs: making room may take those away.
        if not self._make_room(-(-(stop - first) // page_size)) or not super().extend(row, start, stop):
            return False
        self.windows.give(self.windows.lacking(slots[first:stop]))
        return True

    def publish(self, row: int, start: int, stop: int, extra_key: str) -> None:
        """Hand tokens to the tree, as `Holdings.publish`; their window slots too."""
        super().publish(row, start, stop, extra_key)
        self.window_starts[row] = max(self.window_starts[row], self.cached_lens[row])
        stop -= stop % self.page_size
        self._tree.mark_window(self.nodes[row], start, stop)
        self._lock_window(row, self.nodes[row], start + 1 - self.window, stop)
        self._chunked.add(row)

    def release(self, state: RequestState, *, keep: bool) -> None:
        """Free every slot, of both pools, that the tree does not own: see `Holdings.release`."""
        row = state.row
        self._unlock_window(row)
        super().release(state, keep=keep)
        self.window_starts[row] = 0
        self._chunked.discard(row)

    def reset(self) -> None:
        """Start afresh: see `Holdings.reset`."""
        super().reset()
        self.windows = self.windows.new_empty()
        self.window_starts[:] = self._lock_ends[:] = 0
        self._locks.clear()
        self._chunked.clear()

    def violations(self) -> list[str]:
        """Return the mistakes in the bookkeeping of either pool."""
        found, total = super().violations(), self.windows.num_total
        num_lost = total - self.windows.num_free - self.num_window_evictable - self.num_window_held
        if num_lost:
            what = "neither free, cached nor held" if num_lost > 0 else "counted twice among free, cached and held"
            found.append(f"{abs(num_lost)} of {total} window slots are {what}")
        if not self.nodes and self._locks:
            found.append(f"windows of {len(self._locks)} rows are locked, and no request runs")
        return found

    def check(self) -> None:
        """Raise AssertionError if an invariant of either pool is broken. Linear in pages and tree: for tests."""
        super().check()
        own = [self._rows.slots[row, self.window_starts[row] : self.num_slots[row]] for row in self.nodes]
        of_tree = self._tree.window_held() if self.is_cached else np.empty(0, np.int32)
        self.windows.check(np.concatenate([of_tree, *own]))

    def _first_seen(self, computed: int) -> int:
        """Return the first token (a page's first) whose window slot a row that has computed so many still needs."""
        first = computed - self.window - MARGIN
        return first - first % self.page_size

    def _give_back_behind(self, decodes: np.ndarray) -> None:
        """Free the window slots of these rows' tokens that have fallen behind their windows."""
        first = self._rows.num_computed[decodes] - (self.window + MARGIN)
        first -= first % self.page_size
        starts = self.window_starts[decodes]
        lens = np.maximum(first - starts, 0)
        num_freed = int(lens.sum())
        if num_freed:
            rows, begins = decodes.repeat(lens), starts - lens.cumsum() + lens
            self.windows.free(self._rows.slots[rows, np.arange(num_freed) + begins.repeat(lens)])
            self.window_starts[decodes] = starts + lens
        ends = self._lock_ends[decodes]
        for row in decodes[(ends > 0) & (ends <= first)].tolist():
            self._unlock_window(row)

    def _make_room(self, num_pages: int) -> bool:
        """Have that many window pages free, evicting what nobody uses. False: there are not as many."""
        missing = num_pages * self.page_size - self.windows.num_free
        if missing > 0 and self.num_window_evictable:
            self.windows.free(self._tree.evict_window(missing))
            missing = num_pages * self.page_size - self.windows.num_free
        return missing <= 0

    def _free(self, slots: np.ndarray) -> None:
        self.windows.free(slots)
        super()._free(slots)

    def _on_kept(self, row: int, node: Node, num_existing: int) -> None:
        self._tree.mark_window(node, max(num_existing, int(self.window_starts[row])), node.depth_tokens)

    def _lock_window(self, row: int, node: Node, first: int, stop: int) -> None:
        """Lock the window slots of tokens [first, stop) before the end of `node` instead of what the row has locked."""
        old = self._locks.pop(row, None)
        self._lock_ends[row] = 0
        if node.parent is not None and stop > 0:
            self._tree.lock_window(node, first, stop)
            self._locks[row] = node, first, stop
            self._lock_ends[row] = stop
        if old is not None:
            self._tree.unlock_window(*old)

    def _unlock_window(self, row: int) -> None:
        """Unlock what the row has locked in the tree."""
        old = self._locks.pop(row, None)
        self._lock_ends[row] = 0
        if old is not None:
            self._tree.unlock_window(*old)

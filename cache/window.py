"""A smaller pool for layers that see a window: only tokens that such a layer may still look at have a slot there.

A token has its place in the full pool as ever, and that one names it everywhere. A full page may have a page of the
window pool beside it, page for page: token i of the one is token i of the other. Which page that is stands in a table,
here for the host; the device has its own, by slot (`CachePool.window_slots`), which each step brings up to date.

Layers whose windows differ in length share this pool, and it keeps the tokens of the longest one for all of them: a
token has a slot in every such layer or in none. That costs a layer with a shorter window the difference, and saves a
table, a field of each step and an order of eviction for each length. Attention reads each layer's own window only.
"""

import numpy as np

from cache.allocator import PageAllocator


class WindowSlots:
    """Say which full pages have a page of the window pool, and which.

    `slots` are those of the full pool, int32: whole pages, each in order, of the last one perhaps only the first ones.
    """

    def __init__(self, num_full_pages: int, num_pages: int, page_size: int, window: int) -> None:
        """Both numbers of pages include page 0, padding's, which stands beside the other pool's page 0.

        window: tokens that such a layer sees at most, the newest one included.
        """
        self.page_size, self.window = page_size, window
        self._pages = PageAllocator(num_pages, page_size=1)
        self._page_of = np.zeros(num_full_pages, np.int32)  # 0: none

    def new_empty(self) -> "WindowSlots":
        """Return another one of this size, in which no page has any."""
        return WindowSlots(len(self._page_of), self._pages.num_pages, self.page_size, self.window)

    @property
    def num_free(self) -> int:
        return self._pages.num_free * self.page_size

    @property
    def num_total(self) -> int:
        return self._pages.num_total * self.page_size

    def give(self, full_pages: np.ndarray) -> None:
        """Give a window page to each of `full_pages`, which have none. There must be as many free."""
        pages = self._pages.allocate(len(full_pages))
        assert pages is not None, f"{len(full_pages)} window pages wanted, {self._pages.num_free} free"
        self._page_of[full_pages] = pages

    def free(self, slots: np.ndarray) -> None:
        """Take the window pages of the pages of `slots` back, where they have one."""
        full_pages = self.full_pages(slots)
        pages = self._page_of[full_pages]
        self._page_of[full_pages] = 0
        self._pages.free(pages[pages > 0])

    def lacking(self, slots: np.ndarray) -> np.ndarray:
        """Return those of the pages of `slots` that have no window page."""
        full_pages = self.full_pages(slots)
        lacking: np.ndarray = full_pages[self._page_of[full_pages] == 0]
        return lacking

    def full_pages(self, slots: np.ndarray) -> np.ndarray:
        """Return the pages of `slots`."""
        return slots if self.page_size == 1 else slots[:: self.page_size] // self.page_size

    def slots_of(self, slots: np.ndarray) -> np.ndarray:
        """Return the window slot (int32) of each of `slots`, which may be any; 0: it has none."""
        if self.page_size == 1:
            window_slots: np.ndarray = self._page_of[slots]
            return window_slots
        pages = self._page_of[slots // self.page_size]
        return np.where(pages > 0, pages * self.page_size + slots % self.page_size, 0).astype(np.int32)

    def check(self, held: np.ndarray) -> None:
        """Raise AssertionError unless exactly the full pages of the slots `held`, each once, have a window page."""
        has_page = np.flatnonzero(self._page_of)
        assert np.array_equal(has_page, np.unique(held // self.page_size)), "window pages that nobody accounts for"
        self._pages.check(self._page_of[has_page])

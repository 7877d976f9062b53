"""Allocation of KV slots, a page at a time.

Page p is the slots p * page_size .. (p + 1) * page_size. Page 0 is never handed out: its slots are where padding
writes. A sequence owns whole pages and fills them in order, so token i sits at place i % page_size of its page.
"""

import numpy as np

MAX_NUM_SLOTS = 1 << 31


class PageAllocator:
    """Keep a stack of free pages. Every method is vectorized and all or nothing: None means too few are free."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """`num_pages` includes page 0: a pool of num_pages * page_size slots, one page of which is padding's."""
        assert min(num_pages, page_size) >= 1, f"num_pages={num_pages}, page_size={page_size}"
        assert num_pages * page_size <= MAX_NUM_SLOTS, f"{num_pages * page_size} slots do not fit int32"
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = np.arange(num_pages - 1, 0, -1, dtype=np.int32)  # the top of the stack is [_num_free_pages - 1]
        self._num_free_pages = num_pages - 1
        self._offsets = np.arange(page_size, dtype=np.int32)

    @property
    def num_free(self) -> int:
        """Slots in free pages. The unused rest of a page in use is not among them."""
        return self._num_free_pages * self.page_size

    @property
    def num_total(self) -> int:
        return (self.num_pages - 1) * self.page_size

    def pages_needed(self, num_old: int, num_new: int) -> int:
        """Return the new pages that a sequence of `num_old` tokens needs to grow by `num_new`."""
        return -(-(num_old + num_new) // self.page_size) + -num_old // self.page_size

    def allocate(self, num_pages: int) -> np.ndarray | None:
        """Return slots (int32 [num_pages * page_size]) of whole pages, page after page."""
        pages = self._pop(num_pages)
        if pages is None or self.page_size == 1:
            return pages
        return (pages[:, None] * self.page_size + self._offsets).reshape(-1)

    def extend(self, num_old: int, last_slot: int, num_new: int) -> np.ndarray | None:
        """Return slots (int32 [num_new]) for a sequence that has `num_old` tokens, the last one in `last_slot`.

        First the rest of its last page, then new pages. `last_slot` is not read when num_old is 0.
        """
        slots = self.allocate(self.pages_needed(num_old, num_new))
        num_in_last_page = min(-num_old % self.page_size, num_new)
        if slots is None:
            return None
        rest = np.arange(last_slot + 1, last_slot + 1 + num_in_last_page, dtype=np.int32)
        return np.concatenate((rest, slots[: num_new - num_in_last_page]))

    def extend_each(self, num_old: np.ndarray, last_slots: np.ndarray) -> np.ndarray | None:
        """Return one more slot (int32 [B]) for each of B sequences: `extend` with num_new = 1, for all or for none.

        num_old: [B] tokens each has; last_slots: int32 [B] where its last token is, not read when page_size is 1.
        """
        if self.page_size == 1:
            return self._pop(len(num_old))
        starts_page = np.flatnonzero(num_old % self.page_size == 0)
        pages = self._pop(len(starts_page))
        if pages is None:
            return None
        slots = last_slots + np.int32(1)
        slots[starts_page] = pages * self.page_size
        return slots

    def free(self, slots: np.ndarray) -> None:
        """Free every page that has a slot in `slots` (int32, any order, each once): the whole page."""
        pages = slots
        if self.page_size > 1:
            pages = np.sort(slots // self.page_size)  # SIMD: np.unique costs 20 times as much
            is_new = np.empty(len(pages), dtype=bool)
            is_new[:1] = True
            np.not_equal(pages[1:], pages[:-1], out=is_new[1:])
            pages = pages[is_new]
        num_free = self._num_free_pages + len(pages)
        assert num_free < self.num_pages, f"{num_free} pages free of {self.num_pages - 1}: something was freed twice"
        # Reversed, as _pop reverses: a page list that is freed and allocated again keeps its order.
        self._free[self._num_free_pages : num_free] = pages[::-1]
        self._num_free_pages = num_free

    def check(self, held: np.ndarray | None = None) -> None:
        """Raise AssertionError if a page is free twice or page 0 is free. Linear in num_pages: for tests and idle time.

        held: every slot in use, each once. Then also: no held page is free, and free + held pages are all pages.
        """
        times_free = np.bincount(self._free[: self._num_free_pages], minlength=self.num_pages)
        assert len(times_free) == self.num_pages, "a page that does not exist is free"
        assert times_free[0] == 0, "page 0 is free"
        assert (times_free <= 1).all(), f"pages freed twice: {np.flatnonzero(times_free > 1)}"
        if held is None:
            return
        assert len(np.unique(held)) == len(held), "a slot is held twice"
        is_held = np.zeros(self.num_pages, dtype=bool)
        is_held[held // self.page_size] = True
        assert not is_held[0], "page 0 is held"
        is_free = times_free == 1
        assert not (is_held & is_free).any(), f"pages held and free: {np.flatnonzero(is_held & is_free)}"
        lost = np.flatnonzero(~(is_held | is_free)[1:]) + 1
        assert len(lost) == 0, f"pages neither held nor free: {lost}"

    def _pop(self, num_pages: int) -> np.ndarray | None:
        """Return the top pages (int32 [num_pages]), a copy."""
        left = self._num_free_pages - num_pages
        if left < 0:
            return None
        pages = self._free[left : self._num_free_pages][::-1].copy()
        self._num_free_pages = left
        return pages

"""The KV slots of running requests: leading ones that the tree owns and shares, the others each request's own."""

import numpy as np

from cache.allocator import PageAllocator
from cache.radix import Match, NoCache, Node, RadixCache
from engine.schedule.rows import Rows
from engine.state import RequestState


class Holdings:
    """Move slots between the pool's free pages, the tree, and the rows of running requests.

    Of a row, slots [0, cached_lens) are the tree's, which `nodes` keeps locked; [cached_lens, num_slots) are its own.
    Both are 0 for rows that nobody runs in.
    """

    def __init__(self, rows: Rows, allocator: PageAllocator, cache: RadixCache) -> None:
        self._rows = rows
        self.allocator, self.cache = allocator, cache  # other objects after a `reset`
        self.page_size = allocator.page_size
        self.is_cached = not isinstance(cache, NoCache)
        self.nodes: dict[int, Node] = {}  # row -> the tree node it locks
        self.cached_lens = np.zeros(rows.num_rows + 1, np.int64)
        self.shared_lens = np.zeros(rows.num_rows + 1, np.int64)  # leading tokens that others held at its admission
        self.num_slots = np.zeros(rows.num_rows + 1, np.int64)

    @property
    def num_available(self) -> int:
        """Slots that can be had at once, cached ones included."""
        return self.allocator.num_free + self.cache.num_evictable

    def start(self, row: int, node: Node, num_shared: int) -> None:
        """Hold the prefix that ends at `node`, which the caller has locked; its first chunk takes the slots over."""
        self.nodes[row] = node
        self.shared_lens[row] = num_shared

    def max_chunk(self, chunk: int) -> int:
        """Return the most tokens of one request, `chunk` at most, that surely find room in a pool with nothing else."""
        return chunk

    def adopt(self, row: int, match: Match, start: int) -> None:  # noqa: ARG002
        """Take over the slots of a cached prefix, where it is longer than what the row has of the tree.

        start: the first token that will be computed.
        """
        had_cached, num_cached = int(self.cached_lens[row]), len(match.slots)
        if num_cached > had_cached:
            self._lock(row, match.node)
            self._rows.slots[row, had_cached:num_cached] = match.slots[had_cached:]
            self.cached_lens[row] = num_cached
            self.num_slots[row] = max(num_cached, int(self.num_slots[row]))

    def extend_each(self, decodes: np.ndarray, computed: np.ndarray) -> np.ndarray | None:
        """Allocate one slot (int32 [B]) for each of `decodes`, evicting what nobody uses. None: the pool has no room.

        computed: int64 [B], tokens of each so far.
        """
        rows, allocator = self._rows, self.allocator
        last_slots = rows.slots[decodes, computed - 1] if self.page_size > 1 else computed  # then not read
        slots = allocator.extend_each(computed, last_slots)
        if slots is None and self.evict(len(decodes) * self.page_size):
            slots = allocator.extend_each(computed, last_slots)
        if slots is not None:
            rows.slots[decodes, computed] = slots
        return slots

    def extend(self, row: int, start: int, stop: int) -> bool:  # noqa: ARG002
        """Allocate slots for the first `stop` tokens, evicting what nobody uses. False: the pool has no room.

        start: the first token that will be computed; those before it have been, or are cached.
        """
        have, slots = int(self.num_slots[row]), self._rows.slots
        if stop <= have:
            return True
        last_slot = int(slots[row, have - 1]) if have else 0
        new = self.allocator.extend(have, last_slot, stop - have)
        if new is None and self.evict(stop - have + self.page_size):
            new = self.allocator.extend(have, last_slot, stop - have)
        if new is None:
            return False
        slots[row, have:stop] = new
        self.num_slots[row] = stop
        return True

    def publish(self, row: int, start: int, stop: int, extra_key: str) -> None:  # noqa: ARG002
        """Hand the whole pages of the row's first `stop` tokens to the tree. They stay locked.

        start: the first of them that will be computed.
        """
        rows = self._rows
        if stop <= self.cached_lens[row]:
            return
        _, node = self.cache.insert(rows.token_ids[row, :stop], rows.slots[row, :stop], extra_key)
        self._lock(row, node)
        self.cached_lens[row] = stop - stop % self.page_size

    def give_back(self, row: int, stop: int) -> None:
        """Free the pages behind those of the row's first `stop` tokens."""
        first = -(-stop // self.page_size) * self.page_size
        if self.num_slots[row] > first:
            self._free(self._rows.slots[row, first : self.num_slots[row]])
        self.num_slots[row] = min(stop, int(self.num_slots[row]))

    def release(self, state: RequestState, *, keep: bool) -> None:
        """Free every slot that the tree does not own; `keep`: hand computed tokens to the tree first."""
        rows, row = self._rows, state.row
        cached, num_slots = int(self.cached_lens[row]), int(self.num_slots[row])
        if keep:
            # The last known token's KV exists only if a launched step computes it: not certain, so left out.
            stop = min(int(rows.num_known[row]) - 1, int(rows.num_computed[row]))
            stop -= stop % self.page_size
            if self.is_cached and stop > cached:
                tokens, slots = rows.token_ids[row, :stop], rows.slots[row, :stop]
                num_existing, node = self.cache.insert(tokens, slots, state.extra_key)
                if num_existing > cached:
                    self._free(rows.slots[row, cached:num_existing])
                self._on_kept(row, node, num_existing)
                cached = stop
        if num_slots > cached:
            self._free(rows.slots[row, cached:num_slots])
        self.cache.unlock(self.nodes.pop(row))
        self.cached_lens[row] = self.num_slots[row] = 0

    def evict(self, num_tokens: int) -> bool:
        """Free what the tree alone holds until `num_tokens` slots are free. False: nothing needed, or could be, freed.

        True does not say that there are now as many.
        """
        missing = num_tokens - self.allocator.num_free
        if missing <= 0 or not self.cache.num_evictable:
            return False
        self._free(self.cache.evict(missing))
        return True

    def drop_cache(self) -> None:
        """Empty the tree, in which nothing may be locked."""
        self._free(self.cache.reset())

    def reset(self) -> None:
        """Start afresh, after an error that may have come half way: nobody holds anything, the tree is empty."""
        self.nodes.clear()
        self.cached_lens[:] = 0
        self.num_slots[:] = 0
        self.allocator = PageAllocator(self.allocator.num_pages, self.page_size)
        self.cache = self.cache.new_empty()

    @property
    def num_held(self) -> int:
        """Slots in pages of running requests: those locked in the tree, and those that rows have of their own.

        Counted by who holds them, not as what is neither free nor cached. Vector work over all rows.
        """
        num_pages = -(-self.num_slots // self.page_size)
        return self.cache.num_locked + int((num_pages * self.page_size - self.cached_lens).sum())

    def violations(self) -> list[str]:
        """Return the mistakes in the bookkeeping: pages that nobody accounts for, locks of nobody. [] if none.

        Does not look at pages and nodes one by one, as `check` does: for idle time.
        """
        found = []
        total = self.allocator.num_total
        num_lost = total - self.allocator.num_free - self.cache.num_evictable - self.num_held
        if num_lost:  # said without what changes from step to step: one mistake is one message
            what = "neither free, cached nor held" if num_lost > 0 else "counted twice among free, cached and held"
            found.append(f"{abs(num_lost)} of {total} KV slots are {what}")
        if not self.nodes and self.cache.num_locked:
            found.append(f"{self.cache.num_locked} cached tokens are locked, and no request runs")
        num_stray = np.count_nonzero(self.num_slots) - sum(self.num_slots[row] > 0 for row in self.nodes)
        if num_stray:
            found.append(f"{num_stray} rows hold KV slots, and no request runs in them")
        return found

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken. Linear in pages and tree: for tests.

        Every page is free, in the tree, or a row's own, and one of these only; every lock is a running request's.
        """
        self.cache.check()
        own = [self._rows.slots[row, self.cached_lens[row] : self.num_slots[row]] for row in self.nodes]
        self.allocator.check(np.concatenate([self.cache.slots(), *own]))
        num_locks: dict[Node, int] = {}
        for node in self.nodes.values():
            for step in self.cache.path(node):
                num_locks[step] = num_locks.get(step, 0) + 1
        for node in self.cache.nodes():
            assert node.lock_ref == num_locks.get(node, 0), f"{node.lock_ref} locks, {num_locks.get(node, 0)} requests"

    def _free(self, slots: np.ndarray) -> None:
        """Free the pages of `slots`."""
        self.allocator.free(slots)

    def _on_kept(self, row: int, node: Node, num_existing: int) -> None:
        """Take note that a request that ends has left its tokens from `num_existing` on to the tree, up to `node`."""

    def _lock(self, row: int, node: Node) -> None:
        """Lock `node` instead of what the row locks."""
        old = self.nodes[row]
        if node is not old:
            self.cache.lock(node)
            self.cache.unlock(old)
            self.nodes[row] = node


def shared_node(node: Node) -> Node:
    """Return the deepest node above `node`, or itself, that more than one request locks; else the root."""
    while node.lock_ref == 1 and node.parent is not None:
        node = node.parent
    return node

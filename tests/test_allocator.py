"""PageAllocator against a dict of sequences."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.allocator import PageAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """The model: the slots of each live sequence, in order, and one list of whole pages taken without a sequence."""

    @initialize(page_size=st.sampled_from([1, 3, 4, 16]), num_pages=st.integers(1, 24))
    def start(self, page_size: int, num_pages: int) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages, page_size)
        self.sequences: dict[int, list[int]] = {}
        self.next_id = 0

    def add(self, slots: list[int]) -> None:
        self.sequences[self.next_id] = slots
        self.next_id += 1

    def pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    @rule(num_pages=st.integers(0, 8))
    def allocate(self, num_pages: int) -> None:
        num_free = self.allocator.num_free
        slots = self.allocator.allocate(num_pages)
        assert (slots is None) == (num_pages * self.page_size > num_free)
        if slots is not None:
            assert slots.dtype == np.int32
            assert slots.shape == (num_pages * self.page_size,)
            self.add(slots.tolist())

    @rule(data=st.data(), num_new=st.integers(0, 40), is_new=st.booleans())
    def extend(self, data: st.DataObject, num_new: int, is_new: bool) -> None:
        if is_new or not self.sequences:
            self.add([])
        owned = self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]
        needed = self.pages_of(len(owned) + num_new) - self.pages_of(len(owned))
        assert self.allocator.pages_needed(len(owned), num_new) == needed
        num_free = self.allocator.num_free
        slots = self.allocator.extend(len(owned), owned[-1] if owned else -1, num_new)
        assert (slots is None) == (needed * self.page_size > num_free)
        if slots is not None:
            assert slots.dtype == np.int32
            assert slots.shape == (num_new,)
            owned.extend(slots.tolist())

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def extend_each(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), unique=True))
        chosen = [i for i in chosen if self.sequences[i]]
        num_old = np.array([len(self.sequences[i]) for i in chosen], dtype=np.int32)
        last_slots = np.array([self.sequences[i][-1] for i in chosen], dtype=np.int32)
        needed = sum(self.pages_of(n + 1) - self.pages_of(n) for n in num_old.tolist())
        num_free = self.allocator.num_free
        slots = self.allocator.extend_each(num_old, last_slots)
        assert (slots is None) == (needed * self.page_size > num_free)
        if slots is not None:
            assert slots.dtype == np.int32
            assert slots.shape == (len(chosen),)
            for i, slot in zip(chosen, slots.tolist(), strict=True):
                self.sequences[i].append(slot)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), unique=True))
        slots = data.draw(st.permutations([slot for i in chosen for slot in self.sequences.pop(i)]))
        self.allocator.free(np.array(slots, dtype=np.int32))

    @invariant()
    def free_plus_held_pages_are_all_pages(self) -> None:
        if not hasattr(self, "allocator"):
            return
        held = [slot for slots in self.sequences.values() for slot in slots]
        self.allocator.check(np.array(held, dtype=np.int32))
        num_held_pages = sum(self.pages_of(len(slots)) for slots in self.sequences.values())
        assert self.allocator.num_total - self.allocator.num_free == num_held_pages * self.page_size
        assert self.allocator.num_total - self.allocator.num_free == num_held_pages * self.page_size

    @invariant()
    def a_sequence_fills_its_pages_in_order(self) -> None:
        for slots in getattr(self, "sequences", {}).values():
            for i, slot in enumerate(slots):
                assert slot >= self.page_size  # page 0 is padding's
                assert slot % self.page_size == i % self.page_size
                assert i % self.page_size == 0 or slot == slots[i - 1] + 1


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_every_page_but_the_first_can_be_handed_out() -> None:
    allocator = PageAllocator(num_pages=5, page_size=4)
    slots = allocator.allocate(4)
    assert slots is not None
    assert sorted(slots.tolist()) == list(range(4, 20))
    assert allocator.num_free == 0
    assert allocator.allocate(1) is None


def test_a_sequence_grows_into_the_rest_of_its_last_page_first() -> None:
    allocator = PageAllocator(num_pages=8, page_size=4)
    first = allocator.extend(0, -1, 6)
    assert first is not None
    num_free = allocator.num_free
    rest = allocator.extend(6, int(first[-1]), 2)
    assert rest is not None
    assert rest.tolist() == [first[-1] + 1, first[-1] + 2]
    assert allocator.num_free == num_free


def test_extend_each_that_does_not_fit_takes_nothing() -> None:
    allocator = PageAllocator(num_pages=4, page_size=4)
    allocator.allocate(2)
    assert allocator.extend_each(np.array([4, 8, 5], np.int32), np.array([7, 11, 4], np.int32)) is None
    assert allocator.num_free == 4


def test_one_slot_gives_back_its_whole_page_once() -> None:
    allocator = PageAllocator(num_pages=4, page_size=4)
    slots = allocator.allocate(3)
    assert slots is not None
    allocator.free(slots[[5, 2, 6, 1]])
    assert allocator.num_free == 8
    allocator.check(slots[8:])


@pytest.mark.parametrize("page_size", [1, 4])
def test_handed_out_slots_stay_what_they_were(page_size: int) -> None:
    allocator = PageAllocator(num_pages=6, page_size=page_size)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert first is not None
    assert second is not None
    before = second.tolist()
    allocator.free(first)
    allocator.free(second)
    assert second.tolist() == before


@pytest.mark.parametrize("page_size", [1, 4])
def test_check_finds_a_page_that_was_freed_twice(page_size: int) -> None:
    allocator = PageAllocator(num_pages=6, page_size=page_size)
    slots = allocator.allocate(4)
    assert slots is not None
    allocator.free(slots[:page_size])
    allocator.check()
    allocator.free(slots[:page_size])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.check()


def test_freeing_more_pages_than_there_are_raises() -> None:
    allocator = PageAllocator(num_pages=3, page_size=1)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(np.array([1], dtype=np.int32))


def test_check_finds_a_page_that_nobody_holds() -> None:
    allocator = PageAllocator(num_pages=4, page_size=2)
    slots = allocator.allocate(2)
    assert slots is not None
    with pytest.raises(AssertionError, match="neither held nor free"):
        allocator.check(slots[:2])

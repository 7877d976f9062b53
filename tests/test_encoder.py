"""Features of pictures without a tower: who waits for whom, within which memory; and the ids and places of pictures."""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cache.interning import FIRST_ID, MIN_FORGOTTEN, Interner
from engine.media import Image, Media, PromptMedia
from engine.request import Request, SamplingParams
from engine.schedule.spans import Spans
from engine.state import FinishReason, RequestState, Status
from engine.vision.encoder import Encoder
from engine.vision.family import rope_positions
from tests.test_scheduler import Traffic

ROW_BYTES = 8  # of a feature: two float32
NUM_FEATURES = 4
PICTURE_BYTES = NUM_FEATURES * ROW_BYTES


class FakeTower:
    """Makes features of a picture's first pixel, when told to; keeps what it has seen, batch by batch."""

    def __init__(self) -> None:
        self.may_go = threading.Semaphore(0)
        self.seen: list[list[int]] = []

    def encode(self, media: Sequence[Media]) -> list[torch.Tensor]:
        assert self.may_go.acquire(timeout=60)
        numbers = [int(one.pixels[0, 0, 0]) for one in media if isinstance(one, Image)]
        self.seen.append(numbers)
        if 13 in numbers:
            raise RuntimeError("unlucky")
        return [torch.full((1, NUM_FEATURES, 2), float(number)) for number in numbers]

    def adopt(self, other: "FakeTower") -> None:
        """Nothing is asked of it but that others see nothing meanwhile."""

    def move_weights(self, device: torch.device | None = None) -> None:
        self.seen.append([-1 if device is None else -2])


class Desk:
    """A scheduler whose requests have pictures, an encoder, and the turns of a loop in which its callbacks run."""

    def __init__(self, max_pictures: int, **options: Any) -> None:
        self.traffic = Traffic(num_tokens=200, num_rows=8, chunk=64, **options)
        self.tower, self.interner = FakeTower(), Interner()
        self.calls: deque[Callable[[], object]] = deque()
        self.came = threading.Semaphore(0)
        self.encoder = Encoder(self.tower, ROW_BYTES, max_pictures * PICTURE_BYTES, 2 * NUM_FEATURES, self.call_soon)
        scheduler = self.traffic.scheduler
        scheduler.feature_source = self.encoder
        self.encoder.on_ready = scheduler.resume
        self.encoder.on_failed = lambda state, error: scheduler.finish(state, FinishReason("abort", message=str(error)))

    def call_soon(self, function: Callable[[], object]) -> None:
        self.calls.append(function)
        self.came.release()

    def submit(self, *numbers: int, tail: int = 5) -> RequestState:
        """Submit a prompt of these pictures and one more token."""
        media = tuple(Image(np.full((2, 2, 3), number, np.uint8), bytes([number])) for number in numbers)
        prompt = [7] * (NUM_FEATURES * len(numbers)) + [tail]
        places = tuple(np.split(np.arange(len(prompt) - 1, dtype=np.int32), len(numbers)))
        prompt_media = PromptMedia(len(prompt), media, tuple(one.digest for one in media), places)
        state = RequestState(Request(f"{numbers}{tail}", prompt, SamplingParams(max_new_tokens=2), media=prompt_media))
        state.prompt_ids = np.array(prompt, np.int32)
        ids = [self.interner.id_of(one.digest, 7) for one in media]
        state.spans = Spans(prompt_media, state.prompt_ids, ids)
        self.traffic.scheduler.submit(state)
        return state

    def see(self, count: int = 1) -> None:
        """Let the tower see so many batches, each as the loop has it take them."""
        for _ in range(count):
            self.turn()
            num_seen = len(self.tower.seen)
            self.tower.may_go.release()
            while len(self.tower.seen) == num_seen or not self.calls:
                assert self.came.acquire(timeout=60), "the tower has nothing to see"
            self.turn()

    def turn(self) -> None:
        """Run what is to run on the loop."""
        while self.calls:
            self.calls.popleft()()

    def finish(self) -> None:
        """Compute all that can be computed."""
        while self.traffic.step() is not None:
            self.turn()


@pytest.fixture
def desk() -> Any:
    made: list[Desk] = []

    def make(max_pictures: int = 10, **options: Any) -> Desk:
        made.append(Desk(max_pictures, **options))
        return made[-1]

    yield make
    for one in made:
        one.tower.may_go.release(100)
        one.encoder.close()


def test_a_request_waits_for_its_pictures_and_others_do_not(desk: Callable[..., Desk]) -> None:
    d = desk()
    waiting, text = d.submit(1, 2), d.traffic.submit([1, 2, 3])
    d.finish()
    assert (text.status, waiting.status) == (Status.FINISHED, Status.WAITING)
    assert d.traffic.scheduler.stats().num_waiting == 1
    d.see()
    d.finish()
    assert waiting.status is Status.FINISHED
    assert d.tower.seen == [[1, 2]]
    assert waiting.spans is None, "its features are let go"


def test_a_picture_is_seen_once_whoever_asks_for_it_and_when(desk: Callable[..., Desk]) -> None:
    d = desk(cached=False)  # no prefix is reused
    states = [d.submit(1), d.submit(1, tail=6), d.submit(1, 2)]
    d.see()
    d.finish()
    later = d.submit(2, 1, tail=9)
    d.turn()
    d.finish()
    assert [state.status for state in (*states, later)] == [Status.FINISHED] * 4
    assert d.tower.seen == [[1, 2]]


def test_who_needs_more_when_its_cached_prefix_has_gone_lets_go_of_what_it_holds(desk: Callable[..., Desk]) -> None:
    d = desk(max_pictures=0)  # room for those of one request
    first = d.submit(1)
    d.see()
    d.finish()
    states = [d.submit(1, 2), d.submit(1, 3)]
    assert d.traffic.step() is None, "both need their second picture"
    d.see()
    assert d.tower.seen == [[1], [2]]
    d.traffic.scheduler.held.reset()
    for _ in range(3):
        d.finish()
        d.see()
    d.finish()
    assert d.tower.seen[2:] == [[3], [1, 2], [1, 3]], "either needs both now, and holds none while it waits"
    assert [state.status for state in (first, *states)] == [Status.FINISHED] * 3


def test_a_cached_prefix_needs_no_features_even_if_none_are_kept(desk: Callable[..., Desk]) -> None:
    d = desk(max_pictures=0)
    d.submit(1)
    d.see()
    d.finish()
    again = d.submit(1, tail=6)
    d.finish()
    assert (again.status, again.num_cached_tokens) == (Status.FINISHED, NUM_FEATURES)
    assert d.tower.seen == [[1]]


def test_features_never_take_more_memory_than_they_may_and_all_get_their_turn(desk: Callable[..., Desk]) -> None:
    d = desk(max_pictures=2, cached=False)
    states = [d.submit(number, number + 1) for number in (1, 3, 5)]
    for i in range(3):
        d.see()
        assert d.encoder.alive_bytes <= 2 * PICTURE_BYTES
        assert [state.status is Status.FINISHED for state in states].count(True) == i
        d.finish()
    assert all(state.status is Status.FINISHED for state in states)
    assert d.tower.seen == [[1, 2], [3, 4], [5, 6]]


def test_an_ended_request_needs_nothing_and_a_failure_ends_those_who_need_it(desk: Callable[..., Desk]) -> None:
    d = desk()
    first, gone, unlucky, last = d.submit(1), d.submit(2), d.submit(13), d.submit(3)
    d.turn()  # the tower has begun with the first two
    d.traffic.scheduler.finish(gone, FinishReason("abort"))
    d.see(2)
    d.finish()
    assert (first.status, gone.status, unlucky.status) == (Status.FINISHED,) * 3
    assert unlucky.finish_reason is not None and unlucky.finish_reason.message == "unlucky"
    assert last.status is Status.FINISHED and last.finish_reason is not None
    assert d.encoder.stats.num_failed > 0


def test_a_retracted_request_has_its_pictures_seen_again_if_they_are_not_kept(desk: Callable[..., Desk]) -> None:
    d = desk(max_pictures=0, cached=False)
    state = d.submit(1)
    d.see()
    assert d.traffic.step() is not None
    d.traffic.scheduler.retract_all()
    d.traffic.in_flight.clear()
    d.finish()
    assert state.status is Status.WAITING
    d.see()
    d.finish()
    assert (state.status, d.tower.seen) == (Status.FINISHED, [[1], [1]])


async def test_features_of_another_tower_are_found_no_more_though_a_request_holds_them(
    desk: Callable[..., Desk],
) -> None:
    d = desk(max_pictures=2)
    before = d.submit(1)
    d.see()
    assert before.spans is not None and before.spans.features[0] is not None
    await d.encoder.adopt(FakeTower())
    d.submit(1, tail=6)
    d.see()
    assert d.tower.seen == [[1], [1]]
    d.submit(2)
    d.turn()
    assert len(d.traffic.scheduler.parked) == 1, "there is no room for a third picture's: what is held counts"
    d.finish()
    d.see()
    d.finish()
    assert d.tower.seen == [[1], [1], [2]]


async def test_who_waits_while_the_tower_changes_gets_features_of_the_new_one_alone(desk: Callable[..., Desk]) -> None:
    d = desk(max_pictures=8)
    ready = d.submit(9)
    d.see()
    half_way = d.submit(1, 2, 3, tail=6)
    d.turn()
    adopting = asyncio.create_task(d.encoder.adopt(FakeTower()))
    await asyncio.sleep(0)  # behind the first two, before the third
    d.see()
    d.tower.may_go.release(3)
    await adopting
    d.traffic.scheduler.forget_features()
    assert ready.spans is not None and ready.spans.missing(0) == [0]
    while d.traffic.scheduler.has_work:
        if d.traffic.scheduler.parked:
            assert d.came.acquire(timeout=60)
            d.turn()
        d.finish()
    assert [state.status for state in (ready, half_way)] == [Status.FINISHED] * 2
    assert sorted(itertools.chain(*d.tower.seen[:2])) == [1, 2, 9]
    assert sorted(itertools.chain(*d.tower.seen[2:])) == [1, 2, 3, 9]


async def test_a_released_tower_sees_nothing_and_serves_who_waited_when_it_is_back(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.submit(1)
    d.see()
    d.finish()
    await d.encoder.release()
    d.traffic.scheduler.held.drop_cache()
    waiting = [d.submit(1), d.submit(2, tail=6)]
    d.turn()
    d.tower.may_go.release()
    await d.encoder.release()  # behind whatever it was given to see
    assert d.tower.seen == [[1], [-2], [-2]]
    assert [state.status for state in waiting] == [Status.WAITING] * 2
    await d.encoder.resume()
    while len(d.tower.seen) < 5 or not d.calls:
        assert d.came.acquire(timeout=60)
    d.turn()
    d.finish()
    assert d.tower.seen[3:] == [[-1], [1, 2]]
    assert [state.status for state in waiting] == [Status.FINISHED] * 2


def test_an_id_means_one_key_and_is_never_given_twice() -> None:
    interner = Interner()
    ids = {interner.id_of(b"%d" % i, 7) for i in range(MIN_FORGOTTEN)}
    assert len(ids) == MIN_FORGOTTEN and min(ids) == FIRST_ID
    assert interner.is_full
    kept = interner.id_of(b"5", 7)
    interner.forget_others([kept])
    assert interner.id_of(b"5", 7) == kept
    assert interner.id_of(b"6", 7) not in ids
    assert interner.tokens(np.array([3, kept, 4], np.int32)).tolist() == [3, 7, 4]


def test_positions_go_on_behind_the_longer_side_of_a_picture() -> None:
    rope = rope_positions(12, [(2, (1, 2, 3), 1.0), (9, (2, 1, 1), 2.5)])
    assert rope.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 8, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 7],
    ]


def test_chunks_cut_through_no_picture_whose_tokens_see_each_other() -> None:
    places = np.array([2, 3, 4, 7, 8], np.int32)
    media = PromptMedia(12, (), (), (places,), is_whole=True)
    spans = Spans(media, np.arange(12, dtype=np.int32), [FIRST_ID])
    assert spans.until.tolist() == [1, 2, 5, 5, 5, 6, 7, 9, 9, 10, 11, 12]
    assert [spans.whole_stop(0, stop) for stop in range(1, 13)] == [1, 2, 2, 2, 5, 6, 7, 7, 9, 10, 11, 12]
    assert spans.whole_stop(2, 3) == 5, "a picture that does not fit is computed whole"
    assert spans.longest == 3

"""Features of the pictures of requests: each computed once, on a thread, and kept for those who come with it again.

Features are on the device and large, so there is a limit for all of them: those that requests hold until their steps
have read them, and those that are kept, least recently used ones dropped first. A request whose features would exceed
it waits until others have let theirs go; it waits for all of its own at once, so none waits for another half way.
"""

import asyncio
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from engine.media import EncoderStats, Media
from engine.state import RequestState, Status

Features = Any
"""A tensor [layers, features, hidden]."""


class Sees(Protocol):
    def encode(self, media: Sequence[Media]) -> list[Features]: ...
    def adopt(self, other: Any) -> None: ...
    def move_weights(self, device: torch.device | None = None) -> None: ...


@dataclass(slots=True, eq=False)
class _Job:
    """A request that waits for features."""

    state: RequestState
    missing: Sequence[int]  # its pictures that need some
    wanted: dict[bytes, Features | None] = field(default_factory=dict)  # by key; None: not there yet


class Encoder:
    """Compute features for a scheduler. Not thread-safe: used on the event loop, but for the tower's thread.

    `on_ready` and `on_failed` are set by who drives the scheduler.
    """

    def __init__(
        self,
        tower: Sees,
        row_bytes: int,
        max_bytes: int,
        max_batch: int,
        call_soon: Callable[..., object],
    ) -> None:
        """row_bytes: of one feature. max_bytes: of all features. max_batch: of those that the tower makes in one go.

        call_soon: runs a function on the event loop, from any thread.
        """
        self.stats = EncoderStats()
        self.on_ready: Callable[[RequestState], object] = lambda _: None
        self.on_failed: Callable[[RequestState, BaseException], object] = lambda *_: None
        self._tower, self._call_soon = tower, call_soon
        self._row_bytes, self._max_bytes, self._max_batch = row_bytes, max_bytes, max_batch
        self._kept: OrderedDict[bytes, Features] = OrderedDict()  # least recently used first
        self._alive: weakref.WeakValueDictionary[bytes, Features] = weakref.WeakValueDictionary()  # that anybody holds
        self._queue: deque[tuple[RequestState, Sequence[int]]] = deque()  # what waits for room, and its pictures
        self._jobs: list[_Job] = []  # that wait for the tower
        self._pending: OrderedDict[bytes, tuple[Media, int]] = OrderedDict()  # what it has yet to see, and its bytes
        self._running: dict[bytes, int] = {}  # what it sees now, and the bytes of that
        self._begun_at = 0.0  # time.perf_counter() when it began to see those
        self._is_closed = self._is_released = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tower")

    def read_stats(self) -> EncoderStats:
        """Return `stats` as they are now."""
        return replace(self.stats, feature_bytes=self.alive_bytes)

    def fetch(self, state: RequestState, missing: Sequence[int]) -> bool:
        """See `FeatureSource.fetch`."""
        spans = state.spans
        assert spans is not None
        found = {i: self._alive.get(spans.media.keys[i]) for i in missing}
        if all(features is not None for features in found.values()):
            for i, features in found.items():
                spans.features[i] = features
                if spans.media.keys[i] in self._kept:
                    self._kept.move_to_end(spans.media.keys[i])
            self.stats.num_hits += len(found)
            return True
        # Some that it waited for before it may have already, if its cached prefix has become shorter since. It holds
        # none while it waits, or two of these would wait for each other.
        held = [i for i, features in enumerate(spans.features) if features is not None]
        for i in held:
            spans.features[i] = None
        self._queue.append((state, sorted([*missing, *held])))
        self._call_soon(self._start_jobs)  # not before the caller has parked the request
        return False

    async def adopt(self, other: Sees) -> None:
        """Have the tower take over another's weights, between two of its calls; none of what it made is found again.

        Requests go on with features that they hold (see `Scheduler.forget_features`); who waits for some waits anew.
        """
        await asyncio.wrap_future(self._thread.submit(self._tower.adopt, other))
        self._kept.clear()
        for key, features in list(self._alive.items()):  # counted for as long as it is held, but never found
            del self._alive[key]
            self._alive[key + b"before"] = features
        self._queue.extendleft((job.state, job.missing) for job in reversed(self._jobs))
        self._jobs.clear()
        self._start_jobs()

    async def release(self) -> None:
        """Move the tower to host memory and drop what it made. Who needs features waits until `resume`."""
        self._is_released = True
        await asyncio.wrap_future(self._thread.submit(self._tower.move_weights, torch.device("cpu")))
        self._kept.clear()

    async def resume(self) -> None:
        """Move the tower back. `torch.OutOfMemoryError` if there is no room; it stays released then."""
        await asyncio.wrap_future(self._thread.submit(self._tower.move_weights))
        self._is_released = False
        self._run()

    def close(self) -> None:
        self._is_closed = True
        self._queue.clear()
        self._jobs.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _on_freed(self) -> None:
        """Take note, on any thread, that nobody holds some features any more: there is room for others."""
        if self._queue and not self._is_closed:
            self._call_soon(self._start_jobs)

    def _start_jobs(self) -> None:
        """Take requests out of the queue, in order, as far as there is room for what they need."""
        while self._queue:
            state, missing = self._queue[0]
            if state.spans is not None and state.status is Status.WAITING:  # else it has ended
                media = state.spans.media
                wanted = {media.keys[i]: self._alive.get(media.keys[i]) for i in missing}
                new = {
                    media.keys[i]: (media.media[i], len(media.places[i]) * self._row_bytes)
                    for i in missing
                    if wanted[media.keys[i]] is None and not self._is_coming(media.keys[i])
                }
                if not self._make_room(sum(num_bytes for _, num_bytes in new.values())):
                    break
                self.stats.num_hits += len(missing) - len(new)
                self._pending.update(new)
                self._jobs.append(_Job(state, missing, wanted))
            self._queue.popleft()
        self._finish_jobs()
        self._run()

    def _is_coming(self, key: bytes) -> bool:
        return key in self._pending or key in self._running

    def _make_room(self, num_bytes: int) -> bool:
        """Drop kept features until there is room for `num_bytes` more. False: others must let theirs go before."""
        if not num_bytes:
            return True
        coming = sum(num for _, num in self._pending.values()) + sum(self._running.values())
        while (used := coming + self.alive_bytes) + num_bytes > self._max_bytes and self._kept:
            self._kept.popitem(last=False)
        return not used or used + num_bytes <= self._max_bytes

    @property
    def alive_bytes(self) -> int:
        """Return the bytes of all features, those of requests and those that are kept."""
        return sum(features.nbytes for features in list(self._alive.values()))

    def _run(self) -> None:
        """Have the tower see what is pending, as much as it may in one go, unless it is busy."""
        needed = {key for job in self._jobs for key, features in job.wanted.items() if features is None}
        for key in [key for key in self._pending if key not in needed]:
            del self._pending[key]
        if self._running or not self._pending or self._is_released:
            return
        batch: list[Media] = []
        for key, (media, num_bytes) in list(self._pending.items()):
            if batch and (sum(self._running.values()) + num_bytes) > self._max_batch * self._row_bytes:
                break
            batch.append(media)
            self._running[key] = num_bytes
            del self._pending[key]
        future = self._thread.submit(self._tower.encode, batch)
        self._begun_at = time.perf_counter()
        future.add_done_callback(lambda done: self._call_soon(partial(self._on_seen, done)))

    def _on_seen(self, done: "Future[list[Features]]") -> None:
        """Take in what the tower has made."""
        keys, error = list(self._running), done.exception()
        self._running.clear()
        self.stats.encode_s += time.perf_counter() - self._begun_at
        if error is None:
            self.stats.num_encoded += len(keys)
            made = dict(zip(keys, done.result(), strict=True))
            for key, features in made.items():
                self._kept[key] = self._alive[key] = features
                weakref.finalize(features, self._on_freed).atexit = False
            for job in self._jobs:
                job.wanted |= {key: made[key] for key in job.wanted.keys() & made.keys()}
            self._finish_jobs()
            while self.alive_bytes > self._max_bytes and self._kept:
                self._kept.popitem(last=False)
        else:
            self.stats.num_failed += len(keys)
            failed = [job for job in self._jobs if not job.wanted.keys().isdisjoint(keys)]
            self._jobs = [job for job in self._jobs if job not in failed]
            for job in failed:
                if job.state.status is Status.WAITING:
                    self.on_failed(job.state, error)
        self._run()
        self._start_jobs()

    def _finish_jobs(self) -> None:
        """Hand over the features of requests that have all of them."""
        done = [job for job in self._jobs if all(features is not None for features in job.wanted.values())]
        self._jobs = [job for job in self._jobs if job not in done and job.state.status is Status.WAITING]
        for job in done:
            spans = job.state.spans
            if spans is not None and job.state.status is Status.WAITING:
                for i in job.missing:
                    spans.features[i] = job.wanted[spans.media.keys[i]]
                self.on_ready(job.state)

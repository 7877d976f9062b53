"""Decode pictures and videos in a few threads, each file once, within the memory that requests may take together."""

import asyncio
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.errors import QueueFull
from engine.media import Image, Media, MediaSize, Video
from server.http.bodies import BodyBudget

T = TypeVar("T")
CACHE_BYTES = 128 << 20  # of pixels that are kept, in case their file comes again: as the next turn's
MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class Opened:
    """A file whose header was read."""

    key: Hashable  # of its pixels
    size: MediaSize
    decode: Callable[[], Media]  # blocks
    working_bytes: int  # of memory, while it is decoded, beside the pixels

    @property
    def pixel_bytes(self) -> int:
        return self.size.width * self.size.height * self.size.num_frames * 3


class Workers:
    """A few threads. Who waits for one can be cancelled; what a thread has begun it ends, and only then is it free."""

    def __init__(self) -> None:
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, "media")
        self._slots = asyncio.Semaphore(num_threads)

    async def run(self, call: Callable[..., T], *args: Any, before: Callable[[], None] | None = None) -> T:
        """Return what `call` returns, in a thread. before: called once there is one; an error of it ends the wait."""
        await self._slots.acquire()
        try:
            if before is not None:
                before()
        except BaseException:
            self._slots.release()
            raise
        return await self._submit(call, *args)

    def _submit(self, call: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()

        def end(_: "Future[T]") -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._slots.release)

        called = self._threads.submit(call, *args)
        called.add_done_callback(end)
        return asyncio.wrap_future(called)


class Decoder:
    """Decodes files that were opened. Requests that show the same one have the same pixels."""

    def __init__(self, budget: BodyBudget, workers: Workers) -> None:
        self.cache = PixelCache(CACHE_BYTES)
        self._budget, self._workers = budget, workers
        self._decoding: dict[Hashable, asyncio.Task[Media]] = {}  # those that run, by key

    async def decoded(self, one: Opened) -> Media:
        """Return the picture or video. `BrokenMedia`, or `QueueFull` if requests hold all memory that they may."""
        media = self.cache.get(one.key)
        if media is not None:
            return media
        if one.key not in self._decoding:
            task = self._decoding[one.key] = asyncio.create_task(self._decode(one))
            task.add_done_callback(lambda task: self._end(one.key, task))
            del task  # see `all_of`
        return await asyncio.shield(self._decoding[one.key])  # others may wait for it as well

    def _end(self, key: Hashable, task: "asyncio.Task[Media]") -> None:
        del self._decoding[key]
        if not task.cancelled():
            task.exception()  # seen, though everybody who waited for it may have gone

    async def _decode(self, one: Opened) -> Media:
        budget, has_room = self._budget, False

        def enter() -> None:
            nonlocal has_room
            self._make_room(one.pixel_bytes + one.working_bytes)
            has_room = True

        try:
            media = await self._workers.run(one.decode, before=enter)
        except BaseException:
            if has_room:
                budget.give_back(one.pixel_bytes)
            raise
        finally:
            if has_room:
                budget.give_back(one.working_bytes)
        holding = weakref.finalize(array_of(media), budget.give_back, one.pixel_bytes)
        holding.atexit = False
        self.cache.put(one.key, media)
        return media

    def _make_room(self, num_bytes: int) -> None:
        try:
            self._budget.take(num_bytes)
        except QueueFull:
            self.cache.clear()
            self._budget.take(num_bytes)


class PixelCache:
    """The pictures and videos decoded last, by the digests of their files: as many as fit into `max_bytes`.

    Beside these, all whose pixels somebody still holds.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._media: OrderedDict[Hashable, Media] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[Hashable, np.ndarray] = weakref.WeakValueDictionary()
        self._facts: dict[Hashable, tuple[bytes, tuple[float, ...] | None]] = {}  # digest, times; of those alive

    def get(self, key: Hashable) -> Media | None:
        media = self._media.get(key)
        if media is not None:
            self._media.move_to_end(key)
            return media
        pixels, facts = self._alive.get(key), self._facts.get(key)
        if pixels is None or facts is None:
            return None
        digest, times_s = facts
        return Image(pixels, digest) if times_s is None else Video(pixels, times_s, digest)

    def put(self, key: Hashable, media: Media) -> None:
        pixels = array_of(media)
        self._facts[key] = media.digest, media.times_s if isinstance(media, Video) else None
        self._alive[key] = pixels
        weakref.finalize(pixels, self._facts.pop, key, None).atexit = False
        if pixels.nbytes > self.max_bytes // 2:
            return
        self._media[key] = media
        self.num_bytes += pixels.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._media.popitem(last=False)
            self.num_bytes -= array_of(oldest).nbytes

    def clear(self) -> None:
        """Forget those that nobody else holds."""
        self._media.clear()
        self.num_bytes = 0


def array_of(media: Media) -> np.ndarray:
    """Return the pixels, of an image or of all frames."""
    return media.pixels if isinstance(media, Image) else media.frames


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what the calls return, made at the same time. The first error ends the others.

    An error knows the frames that it came through. None of them may know the task or future that knows the error, here
    and wherever a thread is waited for: the files it was about would stay until the garbage collector finds them.
    """
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        _cancel(tasks)
        await asyncio.gather(*tasks, return_exceptions=True)
        tasks.clear()


def _cancel(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()

"""An event loop on a thread of its own, so that plain scripts, notebooks and async programs use the same code."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")
SHUT_DOWN = "the backend has been shut down"


class LoopThread:
    """Runs coroutines for any thread. The thread is a daemon: a script may end without closing it."""

    def __init__(self, name: str) -> None:
        self.loop = uvloop.new_event_loop()
        self.on_close: list[Callable[[], Awaitable[object]]] = []  # awaited on the loop, last first
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def is_current(self) -> bool:
        """True if the caller is on the loop's own thread, where waiting would stop the loop."""
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run `coroutine` on the loop. Cancelling the future cancels it. `RuntimeError` once the loop is closed."""
        if self.loop.is_closed():
            coroutine.close()
            raise RuntimeError(SHUT_DOWN)
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` on the loop, soon. `RuntimeError` once the loop is closed."""
        if self.loop.is_closed():
            raise RuntimeError(SHUT_DOWN)
        self.loop.call_soon_threadsafe(callback, *args)

    def wait(self, future: "Future[T]") -> T:
        """Return the result of `future`, which something on the loop sets. Blocks the caller's thread."""
        if self.is_current and not future.done():
            raise RuntimeError("this would block the event loop that must do the work; use `await s.get(name)`")
        return future.result()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and return its result. Blocks the caller's thread."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError("this would block the event loop that must do the work; await the coroutine instead")
        return self.submit(coroutine).result()

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Yield the items of an asynchronous iterator that lives on the loop, for a plain `for`."""
        while (item := self.run(_next(items))) is not _END:
            yield item  # type: ignore[misc]

    async def aiterate(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """Yield the items of an asynchronous iterator that lives on the loop, for `async for` on any other loop."""
        while (item := await asyncio.wrap_future(self.submit(_next(items)))) is not _END:
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Cancel what still runs, let go of what was opened, then end the thread."""
        if self.loop.is_closed():
            return
        ended = asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        if self.is_current:  # the owner was forgotten by a task of its own
            return
        ended.result()
        self._thread.join()
        self.loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            while self.on_close:
                await self.on_close.pop()()
        finally:
            self.loop.stop()


_END = object()


async def _next(items: AsyncIterator[T]) -> "T | object":
    # Not StopAsyncIteration: a future cannot carry it from thread to thread.
    return await anext(items, _END)

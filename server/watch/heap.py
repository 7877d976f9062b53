"""Memory that the C library keeps after a load, given back to the system once nothing runs.

glibc's malloc keeps what was freed, in pieces between what is still in use: after bodies of 32 MB and steps of many
requests that is 100 to 200 MB, and it stays for as long as the process lives unless somebody asks for it. All of it can
be had from malloc's first arena only, so that all threads share that one.
"""

import asyncio
import contextlib
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web

from engine.engine import Engine

LOOK_S = 5.0
M_ARENA_MAX = -8  # the parameter's number in malloc.h
MIN_GROWTH_BYTES = 16 << 20  # since the last time: less is not worth the walk through all that is free


def resident_bytes() -> int:
    """Return the memory of this process as the system sees it; 0 where it does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def use_one_arena() -> None:
    """Have all threads take memory from malloc's first arena. To be called before there are threads.

    A trim leaves the end of any other arena as it is: up to 64 MB each, once a body of 32 MB has been freed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give what malloc keeps back to the system: some 20 ms, in which no thread gets a large piece of memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(ctypes.c_size_t(0))


class Heap:
    """Trims the heap of `engine`'s process while the application lives."""

    def __init__(
        self,
        engine: Engine,
        trim: Callable[[], None] = trim_heap,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        self._engine, self._trim, self._resident = engine, trim, resident
        self._known_bytes = resident()  # after the last trim, or less by now

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Look now and then: a cleanup context."""
        task = asyncio.create_task(self._watch(), name="heap")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Trim the heap if memory has grown and nothing runs or waits: a trim may hold up a step."""
        health, num_bytes = self._engine.health(), self._resident()
        self._known_bytes = min(self._known_bytes, num_bytes)
        if health.num_running or health.num_queued or num_bytes - self._known_bytes < MIN_GROWTH_BYTES:
            return
        await asyncio.to_thread(self._trim)
        self._known_bytes = self._resident()

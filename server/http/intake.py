"""Taking in connections and requests: a burst of them at the pace that the running steps allow."""

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp import web

logger = logging.getLogger(__name__)
T = TypeVar("T")

BACKLOG = 4096  # connections that may wait to be accepted
MAX_ACCEPTS = 16  # in one pass of the event loop
RETRY_S = 1.0  # after the system refused one: no file descriptor is free, say
MAX_COST_A_PASS = 64 << 10  # of requests, in bytes: some 2 ms of the loop
COST_OF_REQUEST = 8 << 10  # beside its body's bytes
PASS_S = 0.002  # of one pass of the loop, for one piece of work that is long


class Acceptor:
    """Accepts the connections of `listener`, a bound socket, from entering to leaving a `with` block.

    `OSError` if the socket cannot listen.

    uvloop's own servers accept one a pass of the loop (libuv does, since 1.45). While answers stream a pass takes
    milliseconds: of a burst of 256 clients the last waited for 0.4 s.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        make_room: Callable[[], object] = lambda: None,
    ) -> None:
        """make_room: called when the system has no room for another connection."""
        self._listener, self._protocol_factory, self._make_room = listener, protocol_factory, make_room
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        listener.listen(BACKLOG)

    def __enter__(self) -> "Acceptor":
        self._resume()
        return self

    def __exit__(self, *_: object) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _resume(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("cannot accept a connection: %s", error)
                self._make_room()
                self._loop.remove_reader(self._listener)
                self._retry = self._loop.call_later(RETRY_S, self._resume)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol_factory, connection)
        except OSError as error:  # the peer has gone
            logger.debug("a connection ended before it began: %s", error)
            connection.close()


class Gate:
    """Lets a few requests through in each pass of the loop, in order, so that steps are launched while the others wait.

    To read a request takes 0.3 ms, or 1 ms with a prompt of thousands of token ids. 512 that come at once would keep
    the loop busy, and the device idle, for half a second.
    """

    def __init__(self) -> None:
        self._spent = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    async def wait(self, body_bytes: int) -> None:
        """Return when a request with a body of that size may be read."""
        cost = COST_OF_REQUEST + body_bytes
        if self._waiting or self._spent >= MAX_COST_A_PASS:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((future, cost))
            await future
        else:
            self._spend(cost)

    def _spend(self, cost: int) -> None:
        if not self._spent:
            asyncio.get_running_loop().call_soon(self._begin_pass)
        self._spent += cost

    def _begin_pass(self) -> None:
        self._spent = 0
        while self._waiting and self._spent < MAX_COST_A_PASS:
            future, cost = self._waiting.popleft()
            if not future.done():  # its client has gone
                future.set_result(None)
                self._spend(cost)


class LongWork:
    """Has long callbacks run one at a time, and leaves the loop to others for as long after each as it took."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Run the block, which must not await, when its time has come."""
        async with self._lock:
            begun = time.perf_counter()
            try:
                yield
            finally:
                await asyncio.sleep(time.perf_counter() - begun)


class Pace:
    """Lets the loop go on now and then while a long piece of work is done on it."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + PASS_S

    async def keep(self) -> None:
        """Let the loop go on if the work has had its time in this pass. To be called after each small part of it."""
        if time.perf_counter() > self._until:
            await asyncio.sleep(0)
            self._until = time.perf_counter() + PASS_S


async def paced(items: Iterable[T], num_a_pass: int = 64) -> AsyncIterator[T]:
    """Yield `items`, a few a pass of the loop: a long list must not hold up the streams.

    Fewer if what is done with them takes long: one may be a character, or a page of text.
    """
    pace = Pace()
    for number, item in enumerate(items, start=1):
        yield item
        if number % num_a_pass == 0:
            await asyncio.sleep(0)
        else:
            await pace.keep()


GATE = web.AppKey("gate", Gate)
LONG_WORK = web.AppKey("long_work", LongWork)

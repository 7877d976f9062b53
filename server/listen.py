"""Taking connections.

uvloop's own servers accept one a turn of the loop (libuv does, since 1.45). While answers stream a turn takes
milliseconds: of a burst of 256 clients the last waited for 0.4 s.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

BACKLOG = 4096  # connections that may wait to be accepted
MAX_ACCEPTS = 16  # in one turn: their requests then take some 5 ms of the loop
RETRY_S = 1.0  # after the system refused one: no file descriptor is free, say


class Acceptor:
    """Accepts the connections of `listener`, a bound socket, from entering to leaving a `with` block."""

    def __init__(self, listener: socket.socket, protocol_factory: Callable[[], asyncio.BaseProtocol]) -> None:
        self._listener, self._protocol_factory = listener, protocol_factory
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Acceptor":
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
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

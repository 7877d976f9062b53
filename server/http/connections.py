"""The connections of clients: what is not HTTP is refused in JSON, and the end of each is seen."""

import asyncio
import select
from operator import itemgetter
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError

from server.http.bodies import SILENCE_S
from server.reading.protocol import json_response

MAX_LINE_BYTES = 64 << 10  # of a request's first line, and of a header: keys and cookies of gateways are long
WATCH_INTERVAL_S = 0.5
MAX_CLOSED = 256  # idle connections, to make room for others
ENDED = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Connection(web.RequestHandler):
    """One client's connection. Requests on it are at work one at a time; up to 32 wait, the others in the socket."""

    __slots__ = ("_made_at", "_will_resume")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._will_resume = False
        self._made_at = self._loop.time()

    @property
    def idle_since(self) -> float | None:
        """The loop's time since which it waits for a request, or the rest of its head; None while one is at work."""
        if self._waiter is None:
            return None
        return self._next_keepalive_close_time - self._keepalive_timeout if self._request_count else self._made_at

    def is_silent(self, now: float) -> bool:
        """Return whether its first request should have come by now."""
        return not self._request_count and now - self._made_at > SILENCE_S

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Go on reading what was paused, in the next pass of the loop.

        aiohttp calls this once the part of a body that it holds is read, and would decompress the next one before it
        returns: nobody else has the loop until the body's end, and a megabyte can become a gigabyte.
        """
        if not (self._reading_paused and resume_parser):
            super().resume_reading(resume_parser)
        elif not self._will_resume:
            self._will_resume = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._will_resume = False
        if self.transport is not None and self._reading_paused:
            super().resume_reading()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be read as HTTP: no handler has it, and nobody knows its path.

        So the answer has every API's fields.
        """
        textual = super().handle_error(request, status, exc, message)  # its record: see `server.http.malformed`
        if status >= 500:
            return textual
        if isinstance(exc, ContentEncodingError):
            status, message = 415, "Content-Encoding cannot be read: gzip and deflate are supported"
        error = {"type": "invalid_request_error", "message": message or "bad request", "code": status, "param": None}
        response = json_response({"type": "error", "error": error}, status)
        response.force_close()
        return response


class Connections:
    """Makes connections of `server`'s, and watches for their ends, from entering to leaving an `async with` block."""

    def __init__(self, server: web.Server, **options: Any) -> None:
        """`options`: a connection's, as `web.AppRunner` takes them."""
        self._server, self._options = server, options
        self._loop = asyncio.get_running_loop()
        self._watching: asyncio.Task[None]

    def __call__(self) -> Connection:
        return Connection(
            self._server, loop=self._loop, max_line_size=MAX_LINE_BYTES, max_field_size=MAX_LINE_BYTES, **self._options
        )

    async def __aenter__(self) -> "Connections":
        self._watching = asyncio.create_task(self._watch(), name="connections")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()
        await asyncio.wait([self._watching])

    def all(self) -> list[Connection]:
        """Return those that are open."""
        return [one for one in self._server.connections if isinstance(one, Connection)]

    async def _watch(self) -> None:
        """Close connections whose clients have gone while nothing was read from them, or have not asked for anything.

        While more waits to be read than may be, a request's body or other requests, the event loop does not look at a
        connection: what its client asked for before would run to the end.
        """
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = self._loop.time()
            for connection in self.all():
                transport = connection.transport
                if transport is None:
                    continue
                if connection.is_silent(now) or (not transport.is_reading() and has_ended(transport)):
                    transport.abort()

    def make_room(self) -> None:
        """Close those that have been idle the longest: the system has no descriptor for another connection."""
        idle = [(since, one) for one in self.all() if (since := one.idle_since) is not None]
        for _, connection in sorted(idle, key=itemgetter(0))[:MAX_CLOSED]:
            connection.force_close()


def has_ended(transport: asyncio.Transport) -> bool:
    """Return whether the peer has closed its side, whatever it sent before."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), ENDED)
    return bool(poll.poll(0))

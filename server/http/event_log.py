"""An answer's events, kept for clients that come, go and come back: the answer goes on without them."""

import asyncio

from aiohttp import web

from server.http.sse import COMMENT, HEADERS, QUIET_S

END = b"\n\n"  # of every event


class EventLog:
    """Takes an answer's events in place of a connection. An event's index is its sequence number."""

    is_direct = True  # nothing is held but the answer's end

    def __init__(self, ended: list[bytes] | None = None) -> None:
        """Start without events, or with all of an answer that has `ended`."""
        self.events = ended or []
        self.wake = asyncio.Event()  # the end is held
        self.is_closed = ended is not None
        self._changed = asyncio.Event()  # another one each time

    def write(self, events: bytes) -> None:
        """Append events, of which each ends with an empty line."""
        self.events += [event + END for event in events.split(END) if event]
        self._notify()

    def close(self) -> None:
        """Note that no more events will come."""
        self.is_closed = True
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def send(self, http_request: web.Request, start: int = 0) -> web.StreamResponse:
        """Send the events from number `start` on, as they come, to the last."""
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(http_request)
        while not self.is_closed:
            changed = self._changed
            if news := self.events[start:]:
                start += len(news)
                await response.write(b"".join(news))
            try:
                await asyncio.wait_for(changed.wait(), QUIET_S)
            except TimeoutError:
                await response.write(COMMENT)
        await response.write_eof(b"".join(self.events[start:]))
        return response

"""Server-sent events, written by the engine's own call.

The path of a token: the engine's step loop calls `Answer.sink`, which builds the event's bytes around the escaped
text and hands them to the socket. No queue, no task switch, one write. That path is left, and deltas are held and
merged in memory until the handler's task sends them as one event, when

- the client reads slower than the model writes (the transport's buffer is above `HIGH_WATER_BYTES`),
- several answers share the connection: the deltas of one pass of the event loop then make one write,
- the answer ends: the last event, the usage and `[DONE]` go out with the end of the response.

A client that waits sees at once what can be said before the first token, and every `QUIET_S` a sign of life: clients
and proxies give up on connections that say nothing.

So the cost of a slow reader is bounded: the transport's buffer and each answer's text, once.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson
from aiohttp import web

HIGH_WATER_BYTES = 64 * 1024
QUIET_S = 15.0  # between signs of life
FIRST_LOOK_S = 0.005  # after which what could not be said at once is tried again; then twice that, and so on
DONE = b"data: [DONE]\n\n"
COMMENT = b": still here\n\n"  # which every client of server-sent events skips
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: object) -> bytes:
    """Return a server-sent event whose data is `value` as JSON."""
    return b"data: %b\n\n" % orjson.dumps(value)


def named_event(value: dict[str, Any]) -> bytes:
    """Return an event named by its value's `type`, as Anthropic's and OpenAI's Responses API define."""
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), orjson.dumps(value))


class Outlet(Protocol):
    """Take the events of an answer."""

    is_direct: bool  # a sink may write by itself: nothing is held that must go first
    wake: asyncio.Event  # to be set when something is held

    def write(self, events: bytes) -> None: ...


class Source(Protocol):
    """One of the answers that share a stream."""

    stream: Outlet
    is_finished: bool

    @property
    def ends_slowly(self) -> bool:
        """Return whether writing the last event takes long."""
        ...

    @property
    def has_last(self) -> bool:
        """Return whether the last delta is held: no other follows."""
        ...

    @property
    def is_opening(self) -> bool:
        """Return whether events are due before the first token."""
        ...

    def open(self) -> bytes:
        """Return the events that begin it, if they are due and what they say is known."""
        ...

    def keep_alive(self) -> bytes:
        """Return a sign of life, unless the client has had some since the last call."""
        ...

    def take_held(self) -> bytes:
        """Return the events of everything held since the last call."""
        ...


class EventStream:
    """One response of server-sent events, of one or more answers. The handler awaits `run`."""

    def __init__(
        self,
        sources: Sequence[Source],
        tail: Callable[[], bytes] = lambda: DONE,
        headers: Mapping[str, str] = HEADERS,
    ) -> None:
        """`tail`: returns the bytes after the last event."""
        self.sources = sources
        self.headers = headers
        self.wake = asyncio.Event()  # something is held, or the transport is full
        self.is_direct = False  # a sink may write by itself: nothing is held that must go first
        self._tail = tail
        self._ends_slowly = any(source.ends_slowly for source in sources)
        self.transport: asyncio.Transport  # set by run
        self._is_chunked = True
        self._timer: asyncio.TimerHandle | None = None
        for source in sources:
            source.stream = self

    def write(self, events: bytes) -> None:
        """Hand `events` to the socket, as one chunk of the response."""
        transport = self.transport
        if not events or transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._is_chunked else events)
        if transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            self.is_direct = False
            self.wake.set()

    async def run(self, http_request: web.Request) -> web.StreamResponse:
        """Send events until every answer has ended. Cancelled when the client disconnects."""
        try:
            return await self._run(http_request)
        finally:
            self._stop_timer()
            self.forget()

    def forget(self) -> None:
        """Forget the sources, which know their stream: such a cycle would wait for the garbage collector."""
        self.sources, self._tail = (), bytes

    async def _run(self, http_request: web.Request) -> web.StreamResponse:
        transport = http_request.transport
        if transport is None:
            raise ConnectionResetError("the client has disconnected")
        self.transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        opening = self._opening()
        await asyncio.sleep(0)  # an idle engine launches the answers' step now: headers need not delay it
        response = web.StreamResponse(headers=self.headers)
        writer = await response.prepare(http_request)
        assert writer is not None
        writer.send_headers()
        self._is_chunked = http_request.version >= (1, 1)  # by prepare
        self.write(opening)
        self._look_after(FIRST_LOOK_S)
        while True:
            await writer.drain()  # at once, unless the transport is full
            self.wake.clear()
            if self._ends_slowly:
                events = b"".join([await self._taken(source) for source in self.sources])
            else:
                events = b"".join([source.take_held() for source in self.sources])
            if all(source.is_finished for source in self.sources):
                break
            self.is_direct = len(self.sources) == 1
            self.write(events)
            await self.wake.wait()
        self._stop_timer()  # nothing may follow the end
        await response.write_eof(events + self._tail())
        return response

    async def _taken(self, source: Source) -> bytes:
        """Return the events of what a source holds, made by a thread if they are its last."""
        is_long = source.ends_slowly and source.has_last
        return await asyncio.to_thread(source.take_held) if is_long else source.take_held()

    def _opening(self) -> bytes:
        """Return what can be said before the first token."""
        return b"".join([source.open() for source in self.sources])

    def _look(self, delay: float) -> None:
        """Write what can be said by now, and look again after `delay` seconds."""
        self.write(self._opening())
        self._look_after(delay)

    def _look_after(self, delay: float) -> None:
        """Look after `delay` seconds, if there is more to say before the first token, or keep alive."""
        if delay < QUIET_S and any([source.is_opening for source in self.sources]):
            self._timer = asyncio.get_running_loop().call_later(delay, self._look, 2 * delay)
        else:
            self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._keep_alive)

    def _keep_alive(self) -> None:
        """Write a sign of life if nothing else has been written lately. A client that does not read gets none."""
        if self.transport.get_write_buffer_size() <= HIGH_WATER_BYTES:
            signs = [source.keep_alive() for source in self.sources]
            self.write(signs[0] if all(signs) else b"")
        self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._keep_alive)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

"""Server-sent events, written by the engine's own call.

The path of a token: the engine's step loop calls `Choice.sink`, which builds the event's bytes around the escaped
text and hands them to the socket. No queue, no task switch, one write. That path is left, and deltas are held and
merged in memory until the handler's task sends them as one event, when

- the client reads slower than the model writes (the transport's buffer is above `HIGH_WATER_BYTES`),
- several answers share the connection: what comes to them in a turn of the event loop then makes one write,
- the answer ends: the last event, the usage and `[DONE]` go out with the end of the response.

So what a slow reader costs is bounded: the transport's buffer and each answer's text, once.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from aiohttp import web

from engine.request import Delta, Logprobs, Request

HIGH_WATER_BYTES = 64 * 1024
DONE = b"data: [DONE]\n\n"
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: object) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(value)


def named_event(value: dict[str, Any]) -> bytes:
    """An event that bears the name of its `type`, as Anthropic's and OpenAI's Responses API want it."""
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), orjson.dumps(value))


class Choice(ABC):
    """One request's events on a stream. Formats differ by API: `events` and `last_events`."""

    request: Request  # set when the request is made, before it is submitted
    stream: "EventStream"

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_output_tokens = 0
        self.is_finished = False
        self._held: Delta | None = None

    @abstractmethod
    def events(self, delta: Delta) -> bytes:
        """The events of a delta that is not the last; empty if there is nothing to say yet."""

    @abstractmethod
    def last_events(self, delta: Delta) -> bytes:
        """The events of a delta with a `finish_reason`."""

    def sink(self, delta: Delta) -> None:
        """Called by the engine, at most once a step."""
        stream = self.stream
        if stream.is_direct and delta.finish_reason is None:
            self.num_output_tokens += len(delta.token_ids)
            stream.write(self.events(delta))
        else:
            self._hold(delta)
            stream.wake.set()

    def _hold(self, delta: Delta) -> None:
        if self.is_finished:
            return
        held = self._held
        if held is None:
            logprobs = None if delta.logprobs is None else Logprobs()
            held = self._held = Delta(delta.request, "", [], None, logprobs)
        held.text += delta.text
        held.token_ids += delta.token_ids
        held.finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            if held.logprobs is None:
                held.logprobs = Logprobs()
            held.logprobs.token += delta.logprobs.token
            held.logprobs.top += delta.logprobs.top
            held.logprobs.token_ids += delta.logprobs.token_ids

    def take_held(self) -> bytes:
        """The events of all that is held."""
        delta, self._held = self._held, None
        if delta is None:
            return b""
        self.num_output_tokens += len(delta.token_ids)
        if delta.finish_reason is None:
            return self.events(delta)
        self.is_finished = True
        return self.last_events(delta)


class EventStream:
    """One response of server-sent events, of one or more choices. `run` is awaited by the handler."""

    def __init__(
        self,
        choices: Sequence[Choice],
        tail: Callable[[], bytes] = lambda: DONE,
        headers: Mapping[str, str] = HEADERS,
    ) -> None:
        self.choices = choices
        self.headers = headers
        self.wake = asyncio.Event()  # something is held, or the transport is full
        self.is_direct = False  # a sink may write by itself: nothing is held that must go first
        self._tail = tail  # what follows the last event
        self.transport: asyncio.Transport  # set by run
        self._is_chunked = True
        for choice in choices:
            choice.stream = self

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
        """Send events until every choice has ended. Cancelled when the client disconnects."""
        try:
            return await self._run(http_request)
        finally:
            # They know the stream: such a cycle, with its connection, would wait for the garbage collector.
            self.choices, self._tail = (), bytes

    async def _run(self, http_request: web.Request) -> web.StreamResponse:
        transport = http_request.transport
        if transport is None:
            raise ConnectionResetError("the client has disconnected")
        self.transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        response = web.StreamResponse(headers=self.headers)
        writer = await response.prepare(http_request)
        assert writer is not None
        writer.send_headers()
        self._is_chunked = http_request.version >= (1, 1)  # by prepare
        while True:
            await writer.drain()  # at once, unless the transport is full
            self.wake.clear()
            events = b"".join([choice.take_held() for choice in self.choices])
            if all(choice.is_finished for choice in self.choices):
                break
            self.is_direct = len(self.choices) == 1
            self.write(events)
            await self.wake.wait()
        await response.write_eof(events + self._tail())
        return response

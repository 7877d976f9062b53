"""One answer in the shape of any API: the engine's deltas in, events or a JSON body out.

`Answer` owns what every API shares: delivery (at once, or held and merged), the parser of reasoning and tool calls,
the count of tokens, how the answer begins, ends and fails. An API's subclass only spells:

    stream    begin  (text | parts)*  end        or, at any time, fail
    no stream whole
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from aiohttp import web

from engine.state import Delta, FinishReason, Logprobs, RequestState, ignore
from server.http.live import LiveRequests, is_failure, written
from server.http.sse import COMMENT, DONE, HEADERS, EventStream, Outlet
from server.parsers import AnswerDelta, AnswerParser
from server.reading.error_shapes import INTERNAL_ERROR
from server.reading.protocol import Owner, json_response

logger = logging.getLogger(__name__)


def failure_of(reason: FinishReason) -> tuple[int, str]:
    """Return the HTTP status and the message of a request that failed."""
    return reason.status_code or 500, reason.message or "the request failed"


class Answer(ABC):
    """The answer to one request, number `index` of its response."""

    stream: Outlet  # set by whoever takes its events
    begins_at_once: ClassVar[bool] = False  # `begin` says something, and needs no token for it

    def __init__(self, index: int, state: RequestState, parser: AnswerParser | None = None) -> None:
        """`parser`: splits the text into reasoning, text and tool calls; None: all of it is text."""
        self.index, self.state, self.parser = index, state, parser
        self.num_output_tokens = 0
        self.reason: FinishReason | None = None  # set once the answer has ended, unless a stream failed
        self.has_begun = False
        self.is_finished = False
        self._is_plain = False  # has begun, and all that follows is text
        self._num_seen_tokens = 0  # when the client was last shown that the server lives
        self._held: Delta | None = None

    # ---- the spelling, by API ----

    @property
    def ends_slowly(self) -> bool:
        """Return whether writing the last event takes long: then a thread does it."""
        return False

    def begin(self) -> bytes:
        """Return the events before the first of the answer's own."""
        return b""

    def may_begin(self) -> bool:
        """Return whether what `begin` says is known by now. Asked where `begins_at_once`, before the first token."""
        return True

    def ping(self) -> bytes:
        """Return an event without a meaning, or a comment. Called after the answer's beginning, if it has one."""
        return COMMENT

    @abstractmethod
    def text(self, delta: Delta) -> bytes:
        """Return the events of a delta that is text and nothing else; empty if there is nothing to report yet."""

    def parts(self, parts: AnswerDelta, logprobs: Logprobs | None) -> bytes:
        """Return the events of what the parser found in a delta. Called on answers with a parser only."""
        raise NotImplementedError

    @abstractmethod
    def end(self, reason: FinishReason) -> bytes:
        """Return the events after the last text or part."""

    @abstractmethod
    def fail(self, reason: FinishReason) -> bytes:
        """Return the last events of an answer that failed, perhaps before it began."""

    @abstractmethod
    def whole(self, delta: Delta) -> Any:
        """Return the JSON of an answer that is not streamed, from its only delta."""

    def reader_of_logprobs(self) -> Callable[[Logprobs], None] | None:
        """Return what is to be called with log-probabilities as they come, if the answer is not streamed.

        The last delta then has those since its last call. None: it has all.
        """
        return None

    # ---- from deltas to these ----

    def sink(self, delta: Delta) -> None:
        """Write a delta, or hold it. Called by the engine, at most once a step."""
        stream = self.stream
        if stream.is_direct and delta.finish_reason is None:
            self.num_output_tokens += len(delta.token_ids)
            stream.write(self.text(delta) if self._is_plain else self.events(delta))
        else:
            self._hold(delta)
            stream.wake.set()

    def events(self, delta: Delta) -> bytes:
        """Return the events of a delta, ahead of them those that begin the answer."""
        begun = b"" if self.has_begun else self._begin()
        if self.parser is None:
            return begun + self.text(delta)
        return begun + self.parts(self.parser.push(delta.text), delta.logprobs)

    @property
    def is_opening(self) -> bool:
        """Return whether events are due before the first token."""
        return self.begins_at_once and not self.has_begun

    @property
    def has_last(self) -> bool:
        """Return whether the last delta is held: no other follows."""
        return self._held is not None and self._held.finish_reason is not None

    def open(self) -> bytes:
        """Return the events that begin the answer, if they are due and what they say is known.

        Not if its first delta is held: they go out with that.
        """
        return self._begin() if self.is_opening and self._held is None and self.may_begin() else b""

    def keep_alive(self) -> bytes:
        """Return a sign of life, unless the client has had some since the last call.

        A parser may have kept the tokens that came, and what has not begun is not spoken for.
        """
        num_seen, self._num_seen_tokens = self._num_seen_tokens, self.num_output_tokens
        is_quiet = self.parser is not None or num_seen == self.num_output_tokens
        return self.ping() if is_quiet and not self.is_opening else b""

    def _begin(self) -> bytes:
        self.has_begun, self._is_plain = True, self.parser is None
        return self.begin()

    def take_held(self) -> bytes:
        """Return the events of all deltas held since the last call, as of one."""
        delta, self._held = self._held, None
        if delta is None:
            return b""
        try:
            return self._events_of_held(delta)
        except Exception:  # as where the engine calls: it fails this answer and no other
            logger.exception("the answer of request %s could not be written", self.state.rid)
            self.is_finished, self.reason = True, None
            return self.fail(FinishReason("abort", message=INTERNAL_ERROR, status_code=500))

    def _events_of_held(self, delta: Delta) -> bytes:
        self.num_output_tokens += len(delta.token_ids)
        reason = delta.finish_reason
        if reason is None:
            return self.events(delta)
        self.is_finished = True
        if is_failure(reason):
            return self.fail(reason)
        self.reason = reason
        return self.last_events(delta, reason)

    def last_events(self, delta: Delta, reason: FinishReason) -> bytes:
        """Return the events of the last delta of an answer that has not failed."""
        news = self.events(delta)
        if self.parser is not None:
            news += self.parts(self.parser.finish(), None)
        return news + self.end(reason)

    def read_whole(self, delta: Delta) -> Any:
        """Return the JSON of an answer that is not streamed, from its only delta."""
        self.num_output_tokens, self.reason = len(delta.token_ids), delta.finish_reason
        return self.whole(delta)

    def _hold(self, delta: Delta) -> None:
        if self.is_finished:
            return
        held = self._held
        if held is None:
            logprobs = None if delta.logprobs is None else Logprobs()
            held = self._held = Delta(delta.state, "", [], None, logprobs)
        held.text += delta.text
        held.token_ids += delta.token_ids
        held.finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            if held.logprobs is None:
                held.logprobs = Logprobs()
            held.logprobs.token += delta.logprobs.token
            held.logprobs.top += delta.logprobs.top
            held.logprobs.token_ids += delta.logprobs.token_ids


async def respond(
    owner: Owner,
    live: LiveRequests,
    rid: str,
    answers: Sequence[Answer],
    *,
    body: Callable[[list[Any]], Any],
    tail: Callable[[], bytes] = lambda: DONE,
    headers: Mapping[str, str] = HEADERS,
) -> web.StreamResponse:
    """Submit the requests of `answers`, all or none, and return the response, a stream if they stream.

    `rid` stands for all of them. `body` makes the JSON of a response from that of each answer; `tail` and `headers`
    are a stream's. Only an HTTP request may ask for a stream. Raises `RequestFailed` if an answer that is not
    streamed failed, and any `EngineError` of a request that is refused.
    """
    states = [answer.state for answer in answers]
    if not states[0].stream:
        for answer in answers:
            answer.state.read_logprobs = answer.reader_of_logprobs()
        try:
            deltas = await live.answers(owner, rid, states)
        finally:
            for state in states:
                state.read_logprobs = None  # else a cycle, like a sink that is the answer's

        def write() -> web.Response:
            return json_response(
                body([answer.read_whole(delta) for answer, delta in zip(answers, deltas, strict=True)])
            )

        return await written(write, states)
    assert isinstance(owner, web.Request)
    for answer in answers:
        answer.state.sink = answer.sink
    stream = EventStream(answers, tail, headers)  # first tokens may come while other requests are still being submitted
    try:
        async with live.submitted(owner, rid, states):
            return await stream.run(owner)
    finally:
        stream.forget()
        for state in states:  # a state that knows its answer is a cycle: it would wait for the garbage collector
            state.sink = ignore

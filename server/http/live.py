"""The requests that HTTP clients wait for now: who owns them, and how they end."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from engine.engine import Engine
from engine.errors import EngineError, InvalidRequest
from engine.media import PromptMedia
from engine.request import Request, SamplingParams
from engine.state import Delta, FinishReason, RequestState, Status
from server.http.bodies import BODY
from server.http.intake import paced
from server.http.owners import bill
from server.reading.protocol import Owner

MANY_LOGPROBS = 1024  # tokens: about 10 ms of writing
MANY_REQUESTS = 512  # likewise
CLIENT_CLOSED_REQUEST = 499
STATES: web.RequestKey[Sequence[RequestState]] = web.RequestKey("states", Sequence)  # of the requests it made


class RequestFailed(EngineError):
    """A request ended in an error that its answer must carry."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason.message or "the request failed")
        self.status_code = reason.status_code or 500


def is_failure(reason: FinishReason | None) -> bool:
    """Return whether the request ended in an error, rather than by itself or by its client's abort."""
    return reason is not None and reason.status_code not in (None, CLIENT_CLOSED_REQUEST)


def new_rid() -> str:
    return uuid.uuid4().hex


@dataclass(slots=True)
class Options:
    """Wishes for a request besides sampling."""

    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] = field(default_factory=list)
    priority: int = 0
    extra_key: str = ""
    may_shorten: bool = False
    max_thinking_tokens: int | None = None
    reasoning_end_ids: list[int] = field(default_factory=list)
    return_hidden_states: bool = False
    media: PromptMedia | None = None


def make_requests(rids: Sequence[str], input_ids: list[int], params: SamplingParams, options: Options) -> list[Request]:
    """Make one request for each of `rids`, all of one prompt. With a seed, answer i is sampled with seed + i."""
    return [
        Request(
            rid=rid,
            input_ids=input_ids,
            sampling_params=_own_params(params, i),
            stream=options.stream,
            return_logprob=options.return_logprob,
            logprob_start_len=options.logprob_start_len,
            top_logprobs_num=options.top_logprobs_num,
            token_ids_logprob=options.token_ids_logprob,
            priority=options.priority,
            extra_key=options.extra_key,
            may_shorten=options.may_shorten,
            max_thinking_tokens=options.max_thinking_tokens,
            reasoning_end_ids=options.reasoning_end_ids,
            return_hidden_states=options.return_hidden_states,
            media=options.media,
        )
        for i, rid in enumerate(rids)
    ]


def _own_params(params: SamplingParams, i: int) -> SamplingParams:
    """Return the parameters of answer i: equal seeds would make equal answers."""
    seed = params.sampling_seed
    if params.n == 1 and (seed is None or i == 0):
        return params  # shared: a list may hold thousands of prompts
    return replace(params, n=1, sampling_seed=None if seed is None else seed + i)


class LiveRequests:
    """Submits the requests of an HTTP request, and aborts what is left of them when its handler ends, however it ends.

    A disconnect cancels the handler (aiohttp's handler_cancellation), so the engine hears of it at once.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.arrival_observers: list[Callable[[RequestState], None]] = []  # called with each request that was accepted
        self.observers: list[Callable[[RequestState], None]] = []  # called with each request that ended
        self._accepted: dict[str, RequestState] = {}  # by rid, those that have not ended
        self._rids: dict[str, list[str]] = {}  # rid given by the client -> rids of the requests made of it

    @asynccontextmanager
    async def submitted(self, owner: Owner, rid: str, states: Sequence[RequestState]) -> AsyncIterator[None]:
        """Submit all of `states`, or none when one of them is refused. `rid` stands for all of them."""
        await self.engine.prepare(states)
        owner[STATES] = states
        if rid in self._rids:
            raise InvalidRequest(f"a request with rid {rid!r} is still running", "rid")
        self._rids[rid] = [state.rid for state in states]
        accepted: list[RequestState] = []
        try:
            async for state in paced(states, num_a_pass=16):
                bill(owner, [state])
                state.joins_others = bool(accepted)
                self.engine.submit(state)
                accepted.append(state)
                self._accepted[state.rid] = state
                for observe in self.arrival_observers:
                    observe(state)
            if (body := owner.get(BODY)) is not None:
                body.drop()  # it would be there as long as its answers take
            yield
        finally:
            del self._rids[rid]
            for state in accepted:
                if self._accepted.get(state.rid) is state:  # once it has ended, another may have its rid
                    del self._accepted[state.rid]
                if state.status is not Status.FINISHED:
                    self.engine.abort(state.rid)
                if state.request.media is not None:  # pixels: those who remember requests need none
                    state.request = replace(state.request, media=None)
                for observe in self.observers:
                    observe(state)

    async def answers(self, owner: Owner, rid: str, states: Sequence[RequestState]) -> list[Delta]:
        """Return the whole answer of each request. Raises when one of them failed."""
        collector = _Collector(len(states))
        for i, state in enumerate(states):
            state.sink = collector.sink_of(i)
        async with self.submitted(owner, rid, states):
            return await collector.done

    def state_of(self, rid: str) -> RequestState | None:
        """Return the request that runs under `rid`; None if none does, or none of a client."""
        return self._accepted.get(rid)

    def end(self, state: RequestState) -> None:
        """Abort the request if it runs: never another of its rid, which it was refused for."""
        if self._accepted.get(state.rid) is state:
            self.engine.abort(state.rid)

    def abort(self, rid: str) -> None:
        for request_rid in self._rids.get(rid, [rid]):
            self.engine.abort(request_rid)


class _Collector:
    """Gathers the only delta of each request that does not stream."""

    def __init__(self, count: int) -> None:
        self.done: asyncio.Future[list[Delta]] = asyncio.get_running_loop().create_future()
        self._deltas: list[Delta | None] = [None] * count
        self._num_missing = count

    def sink_of(self, i: int) -> Any:
        return lambda delta: self._take(i, delta)

    def _take(self, i: int, delta: Delta) -> None:
        if self.done.done():  # the handler has gone: this is the answer to its abort
            return
        reason = delta.finish_reason
        if reason is not None and is_failure(reason):
            self.done.set_exception(RequestFailed(reason))
            return
        self._deltas[i] = delta
        self._num_missing -= 1
        if not self._num_missing:
            self.done.set_result([delta for delta in self._deltas if delta is not None])


async def written(write: Callable[[], web.Response], states: Sequence[RequestState]) -> web.Response:
    """Call `write` on ended requests; off the event loop if they are many, or have long lists of numbers."""
    count = sum(state.num_tokens for state in states if state.return_logprob)
    has_hidden = any(state.return_hidden_states for state in states)
    is_long = count > MANY_LOGPROBS or len(states) > MANY_REQUESTS or has_hidden
    return await asyncio.to_thread(write) if is_long else write()

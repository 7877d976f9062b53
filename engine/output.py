"""Turn sampled tokens into the caller's output: text, stop strings, log-probabilities, deltas.

`take` records the output of a step, at little cost, so that the next step can be decided. `deliver` makes the text of a
few requests and sends it to their sinks, and is called again and again: connections and steps run in between.
Requests with pending output are served in order, and tokens that arrive before a request is served join those that
already wait. So each token is a piece of its own while the host keeps up; where it does not, pieces grow until it does,
and the device need not wait for sockets.

The text of an answer that is sent whole is made in between, too, so that little is left to do at its end: many answers
may end at once.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from engine.errors import InvalidRequest
from engine.schedule.resolver import Outcome
from engine.schedule.scheduler import Scheduler
from engine.state import Delta, FinishReason, Logprobs, RequestState, Status, ignore
from engine.step.logprobs import take_logprobs
from engine.step.model_runner import Step

logger = logging.getLogger(__name__)

MAX_COST = 16  # deltas per call of `deliver`: with the writes to their sockets, about 0.15 ms of the loop
COST_OF_END = 8  # cost of ending a request, in deltas: a handler wakes and ends its response
READ_INTERVAL = 32  # steps in which each answer that is sent whole is read once
READ_LOGPROBS = 8  # tokens of a whole answer whose log-probabilities are read at once: some 25 us


class OutputProcessor:
    """Make the output of requests from the tokens of their steps, and send it to their sinks."""

    def __init__(
        self,
        scheduler: Scheduler,
        stream_interval: int = 1,
        on_end: Callable[[RequestState], None] = lambda _: None,
    ) -> None:
        """Start without pending output.

        stream_interval: least tokens of a delta between the first and the last. on_end: called with each request
        before its last delta.
        """
        self.scheduler, self.stream_interval, self.on_end = scheduler, stream_interval, on_end
        # Requests with pending output, the next one first. One served out of order is skipped: `is_pending` is False.
        self._pending: deque[RequestState] = deque()
        self._whole: OrderedDict[RequestState, None] = OrderedDict()  # sent whole, the next to read first

    @property
    def has_pending(self) -> bool:
        """Return whether `deliver` has something to do."""
        return bool(self._pending)

    def take(self, step: Step, outcome: Outcome) -> None:
        """Record the output of a resolved step. Ends requests whose text has reached a stop string."""
        now = time.perf_counter()
        if step.prompt_logprobs or step.pooled or step.hidden or step.work.logprob_samples is not None:
            self._take_values(step, outcome)
        pending = self._pending
        for state, token in zip(outcome.states, outcome.token_ids, strict=True):
            state.new_token_ids.append(token)
            if not state.is_pending:  # `_add` inlined: no call for each token
                state.is_pending = True
                pending.append(state)
        for state, forced in outcome.forced:
            state.new_token_ids += forced
        for state in outcome.watched:
            self._guarded(self._read, state)
        for state in outcome.finished:
            state.times.finished = now
            self._add(state)
        for state in reversed(step.plan.answering):  # each is put in front, so the first ends up first
            state.times.first_token = state.times.first_token or now
            if state.is_pending:  # users wait less patiently for a first token than for the next
                pending.appendleft(state)
            elif not state.wants_tokens and state.status is Status.RUNNING:
                self._whole[state] = None
        for _ in range(-(-len(self._whole) // READ_INTERVAL)):
            state = next(iter(self._whole))
            self._whole.move_to_end(state)
            self._add(state)

    def _take_values(self, step: Step, outcome: Outcome) -> None:
        """Record a step's log-probabilities, pooled vectors and hidden states."""
        for values in step.prompt_logprobs:
            values.deliver()
        if step.pooled is not None:
            step.pooled.deliver()
        if step.hidden is not None:
            step.hidden.deliver()
        if step.work.logprob_samples is not None:
            assert step.sampled_logprobs is not None
            take_logprobs(step.sampled_logprobs, step.work.logprob_samples, outcome)

    def _add(self, state: RequestState) -> None:
        if not state.is_pending:
            state.is_pending = True
            self._pending.append(state)

    def deliver(self) -> None:
        """Send the pending output of the next few requests to their sinks."""
        cost = 0
        while self._pending and cost < MAX_COST:
            state = self._pending.popleft()
            if not state.is_pending:
                continue
            state.is_pending = False
            if state.status is Status.FINISHED:
                cost += COST_OF_END
                self.close(state)
            else:
                cost += 1
                self._guarded(self._send, state)

    def flush(self) -> None:
        """Send all pending output: `deliver` may not be called again."""
        while self._pending:
            self.deliver()

    def close(self, state: RequestState) -> None:
        """Send the last delta of an ended request to its sink."""
        state.is_pending = False
        self._whole.pop(state, None)
        times = state.times
        times.finished = times.finished or time.perf_counter()
        times.first_token = times.first_token or times.finished
        stream = state.text_stream
        try:
            self._read(state)
            tail = "" if stream is None else stream.finish()
        except Exception as error:  # noqa: BLE001 - as in _guarded
            state.finish_reason, tail = _refusal(error), ""
        delta = state.unsent or Delta(state, "", [])
        state.unsent = None
        delta.text += tail
        if not state.stream:
            delta.token_ids = state.output_ids
        delta.finish_reason = state.finish_reason
        self.on_end(state)
        give(state, delta)

    def _guarded(self, act: Callable[[RequestState], None], state: RequestState) -> None:
        try:
            act(state)
        except Exception as error:  # noqa: BLE001 - one request's text or sink fails that request and no other
            state.text_stream = None
            self._end(state, _refusal(error))

    def _send(self, state: RequestState) -> None:
        self._read(state)
        delta = state.unsent
        # Without text, the tokens are half a character, or the beginning of a possible stop string.
        if delta is None or not state.stream:
            if delta is not None and delta.logprobs is not None:
                _read_logprobs(state, delta, delta.logprobs)
            return
        if not (delta.text or delta.logprobs is not None or state.text_stream is None):
            return
        if len(delta.token_ids) >= self.stream_interval or not state.has_begun:
            state.unsent, state.has_begun = None, True
            state.sink(delta)

    def _read(self, state: RequestState) -> None:
        """Make the text of the newest tokens, up to a stop; tokens after a stop do not belong to the answer."""
        unsent, stream = state.unsent, state.text_stream
        if not state.wants_tokens:
            num_read = 0 if unsent is None else len(unsent.token_ids)
            state.new_token_ids = self.scheduler.rows.output_ids(state, num_read)
        token_ids = state.new_token_ids
        if not token_ids:
            return
        state.new_token_ids = []
        if unsent is None:
            unsent = state.unsent = Delta(state, "", token_ids)
        else:
            unsent.token_ids += token_ids
        if stream is None:
            return
        shown = token_ids[:-1] if state.finish_reason and _is_trimmed_stop(state, token_ids[-1]) else token_ids
        if not stream.has_stops:
            unsent.text += stream.push(shown)
            return
        for num_read, token in enumerate(shown, start=1):
            unsent.text += stream.push((token,))
            if stream.matched_stop is not None:
                num_after = len(token_ids) - num_read
                del unsent.token_ids[len(unsent.token_ids) - num_after :]
                self.scheduler.rows.cut(state, num_after)
                self._end(state, FinishReason("stop", matched=stream.matched_stop))
                return

    def _end(self, state: RequestState, reason: FinishReason) -> None:
        """End `state` for a reason found in its text, which overrides another reason found at the same token."""
        if state.status is Status.FINISHED:
            state.finish_reason = reason
        else:
            self.scheduler.finish(state, reason)
            state.times.finished = time.perf_counter()
            self._add(state)


def give(state: RequestState, delta: Delta) -> None:
    """Call the request's sink, and drop it after the last delta; errors that the sink raises are logged.

    The sink may refer to the delta and so to the request: a cycle would wait for the garbage collector.
    """
    sink = state.sink
    if delta.finish_reason is not None:
        state.sink = ignore
    try:
        sink(delta)
    except Exception:
        logger.exception("the receiver of request %s failed", state.rid)


def _read_logprobs(state: RequestState, delta: Delta, logprobs: Logprobs) -> None:
    """Have a whole answer's log-probabilities read ahead of its end, when many answers may end at once."""
    if state.read_logprobs is not None and len(logprobs.token) >= READ_LOGPROBS:
        delta.logprobs = Logprobs()
        state.read_logprobs(logprobs)


def _refusal(error: Exception) -> FinishReason:
    """Return the finish reason of an error: a stop regex that takes too long is the client's, anything else ours."""
    if isinstance(error, InvalidRequest):
        return FinishReason("abort", message=str(error), status_code=error.status_code)
    logger.error("a request's text could not be made or sent", exc_info=error)
    return FinishReason("abort", message=f"{type(error).__name__}: {error}", status_code=500)


def _is_trimmed_stop(state: RequestState, token: int) -> bool:
    """Return whether `token` is the stop token that ended the request and is left out of its text."""
    reason = state.finish_reason
    return (
        reason is not None
        and reason.type == "stop"
        and reason.matched == token
        and not state.sampling_params.no_stop_trim
    )

"""The way of a request into the scheduler, and the books on those that are in it."""

import time

from engine.errors import QueueFull
from engine.request import FinishReason, Logprobs, Request
from engine.request_table import RequestTable
from engine.schedule.fairness import DrainRate
from engine.schedule.scheduler import Scheduler
from engine.text.grammar import Matcher
from engine.text.tokenizer import Tokenizer
from engine.verify import RequestLimits


class Intake:
    """Verifies requests, queues them, and forgets them when they end."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, limits: RequestLimits, requests: RequestTable
    ) -> None:
        self.requests = requests
        self.drain_rate = DrainRate()
        self._scheduler, self._tokenizer, self._limits = scheduler, tokenizer, limits

    def submit(self, request: Request) -> None:
        """Queue `request`. Raises what `Engine.submit` raises, with the request forgotten."""
        self._limits.verify(request, self.requests.by_rid)
        if request.pooling is None:
            request.text_stream = self._tokenizer.text_stream(request.sampling_params, request.input_ids)
        self._queue(request)
        if request.matcher is not None:
            try:
                _jump_ahead(request, request.matcher)
            except Exception as error:
                self._scheduler.finish(request, FinishReason("abort", message=str(error), status_code=500))
                raise
        self.requests.add(request)
        if request.logprob_start_len >= 0:  # nothing predicts the first token
            request.input_logprobs = Logprobs([(None, request.input_ids[request.logprob_start_len])], [None], [None])

    def _queue(self, request: Request) -> None:
        now, scheduler = time.perf_counter(), self._scheduler
        try:
            scheduler.submit(request)
        except QueueFull as full:
            self.requests.num_refused += 1
            full.retry_after_s = self.drain_rate.seconds_for(scheduler.shares.num_waiting_work, now)
            raise
        self.drain_rate.busy(now)

    def end(self, request: Request) -> None:
        """Forget `request`, whose last delta is about to be sent."""
        if request.matcher is not None:
            request.matcher.close()
        self.requests.remove(request)
        num_served = self._scheduler.shares.num_served_tokens
        self.drain_rate.observe(time.perf_counter(), num_served, is_idle=not self.requests.by_rid)


def _jump_ahead(request: Request, matcher: Matcher) -> None:
    """Append the tokens that the grammar forces first to the prompt, to be computed with it.

    At least one token is left to be sampled.
    """
    params = request.sampling_params
    assert params.max_new_tokens is not None
    if not matcher.may_jump or params.stop or params.stop_regex or params.stop_token_ids:
        return
    tokens = matcher.jump(max(params.max_new_tokens - 1, 0))
    if tokens and matcher.is_finished:
        matcher.step_back()
        tokens.pop()
    request.output_ids = tokens
    request.num_forced_tokens = len(tokens)
    if request.wants_tokens:
        request.new_token_ids = list(tokens)

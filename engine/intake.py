"""The way of a request into the scheduler, and the books on those that are in it."""

import time

from cache.interning import FIRST_ID, Interner
from engine.errors import InvalidRequest, QueueFull
from engine.media import PromptMedia
from engine.request_table import RequestTable
from engine.schedule.fairness import DrainRate
from engine.schedule.scheduler import Scheduler
from engine.schedule.spans import Spans
from engine.state import FinishReason, Logprobs, RequestState
from engine.text.grammar import GrammarError, Matcher
from engine.text.tokenizer import Tokenizer
from engine.verify import RequestLimits


class Intake:
    """Verifies requests, queues them, and forgets them when they end."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, limits: RequestLimits, requests: RequestTable
    ) -> None:
        self.requests = requests
        self.drain_rate = DrainRate()
        self.interner = Interner()  # of pictures
        self._scheduler, self._tokenizer, self._limits = scheduler, tokenizer, limits

    def submit(self, state: RequestState) -> None:
        """Queue `state`. Raises what `Engine.submit` raises, with the request forgotten."""
        self._limits.verify(state, self.requests.by_rid)
        if state.request.media is not None and state.request.media.media:
            state.spans = self._spans_of(state, state.request.media)
            if state.spans.longest > self._scheduler.chunked_prefill_size:
                raise InvalidRequest(
                    f"a picture has {state.spans.longest} tokens, which one step must compute, and computes at most "
                    f"{self._scheduler.chunked_prefill_size} (--chunked-prefill-size)"
                )
        if state.pooling is None and self._limits.makes_text:
            state.text_stream = self._tokenizer.text_stream(state.sampling_params, state.request.input_ids)
        self._queue(state)
        if state.matcher is not None:
            try:
                _jump_ahead(state, state.matcher)
            except GrammarError as error:  # its engine's limits may be met at the first token
                message = f"the grammar failed: {error}"
                self._scheduler.finish(state, FinishReason("abort", message=message, status_code=400))
                raise InvalidRequest(message) from None
            except Exception as error:
                self._scheduler.finish(state, FinishReason("abort", message=str(error), status_code=500))
                raise
        self.requests.add(state)
        if state.logprob_start_len >= 0:  # nothing predicts the first token
            state.input_logprobs = Logprobs([(None, state.request.input_ids[state.logprob_start_len])], [None], [None])

    def _spans_of(self, state: RequestState, media: PromptMedia) -> Spans:
        """Return what follows the request's pictures, each with the id by which the tree knows it."""
        prompt_ids, interner = state.prompt_ids, self.interner
        assert prompt_ids is not None
        if interner.is_full:
            used = self._scheduler.held.cache.ids_from(FIRST_ID)
            for other in self.requests.by_rid.values():
                used |= set() if other.spans is None else set(other.spans.ids)
            interner.forget_others(used)
        pairs = zip(media.keys, media.places, strict=True)
        return Spans(media, prompt_ids, [interner.id_of(key, int(prompt_ids[places[0]])) for key, places in pairs])

    def _queue(self, state: RequestState) -> None:
        now, scheduler = time.perf_counter(), self._scheduler
        try:
            scheduler.submit(state)
        except QueueFull as full:
            self.requests.num_refused += 1
            full.retry_after_s = self.drain_rate.seconds_for(scheduler.shares.num_waiting_work, now)
            raise
        self.drain_rate.busy(now)

    def end(self, state: RequestState) -> None:
        """Forget `state`, whose last delta is about to be sent."""
        if state.matcher is not None:
            state.matcher.close()
        self.requests.remove(state)
        num_served = self._scheduler.shares.num_served_tokens
        self.drain_rate.observe(time.perf_counter(), num_served, is_idle=not self.requests.by_rid)


def _jump_ahead(state: RequestState, matcher: Matcher) -> None:
    """Append the tokens that the grammar forces first to the prompt, to be computed with it.

    At least one token is left to be sampled.
    """
    params = state.sampling_params
    if not matcher.may_jump or params.stop or params.stop_regex or params.stop_token_ids:
        return
    tokens = matcher.jump(max(state.max_new_tokens - 1, 0))
    if tokens and matcher.is_finished:
        matcher.step_back()
        tokens.pop()
    state.output_ids = tokens
    state.num_forced_tokens = len(tokens)
    if state.wants_tokens:
        state.new_token_ids = list(tokens)

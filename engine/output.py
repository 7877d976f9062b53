"""From sampled tokens to what the caller sees: text, stop strings, log-probabilities, deltas."""

import logging
import time

from engine.errors import InvalidRequest
from engine.model_runner import PromptLogprobs, Step, logprobs_of
from engine.request import Delta, FinishReason, Logprobs, Request, Status
from engine.scheduler import Outcome, Scheduler

logger = logging.getLogger(__name__)

MAX_MERGED_TOKENS = 4
MIN_MERGED_STREAMS = 16  # fewer are not what the device waits for


class OutputProcessor:
    def __init__(self, scheduler: Scheduler, stream_interval: int = 1) -> None:
        self.scheduler, self.stream_interval = scheduler, stream_interval
        self.num_merged = 1  # tokens of a stream that go out together

    def follow(self, num_requests: int, has_run_dry: bool) -> None:
        """Write fewer, longer pieces while the device waits for the host's writing; else each token by itself."""
        if has_run_dry and num_requests >= MIN_MERGED_STREAMS:
            self.num_merged = min(self.num_merged + 1, MAX_MERGED_TOKENS)
        elif self.num_merged > 1:
            self.num_merged -= 1

    def deliver(self, step: Step, outcome: Outcome) -> None:
        """Give every sink what this step brought. Ends requests whose text has reached a stop string."""
        now = time.perf_counter()
        for request in step.plan.answering:
            request.times.first_token = request.times.first_token or now
        for values in step.prompt_logprobs:
            self._add_prompt_logprobs(values)
        if step.pooled is not None:
            step.pooled.deliver()
        min_tokens = max(self.stream_interval, self.num_merged)
        sampled_index = {}
        if step.work.logprob_samples is not None:
            sampled_index = {int(s): i for i, s in enumerate(step.work.logprob_samples)}
        for request, tokens, sample in outcome.tokens:
            unsent = request.unsent
            if unsent is None:
                unsent = request.unsent = Delta(request, "", [])
            unsent.token_ids += tokens
            if sampled_index and sample in sampled_index:
                assert step.sampled_logprobs is not None
                entry = logprobs_of(step.sampled_logprobs, sampled_index[sample], tokens[:1], request)
                unsent.logprobs = _joined(unsent.logprobs, entry)
            try:
                stream = request.text_stream
                if stream is not None:
                    if len(tokens) > 1:
                        self._push_run(unsent, tokens)
                    elif request.finish_reason is None or not _is_trimmed_stop(request, tokens[0]):
                        unsent.text += stream.push(tokens)
                    if stream.matched_stop is not None:
                        self._end(request, FinishReason("stop", matched=stream.matched_stop), outcome)
                # No text: half a character, or the head of what may become a stop string. The first is never held.
                is_due = (unsent.text or unsent.logprobs is not None) and (
                    len(unsent.token_ids) >= min_tokens or request.times.first_token == now
                )
                if is_due and request.stream and request.status is Status.RUNNING:
                    request.unsent = None
                    request.sink(unsent)
            except Exception as error:  # noqa: BLE001 - one request's text or sink fails that request and no other
                request.text_stream = None
                self._end(request, _refusal(error), outcome)
        for request in outcome.finished:
            self.close(request, now)

    def _push_run(self, unsent: Delta, tokens: list[int]) -> None:
        """Text of tokens that came together, up to a stop; those after it are none of the answer's."""
        request = unsent.request
        stream = request.text_stream
        num_text = len(tokens) - _is_trimmed_stop(request, tokens[-1])
        for num_after, token in zip(range(len(tokens) - 1, -1, -1), tokens[:num_text], strict=False):
            unsent.text += stream.push((token,))
            if stream.matched_stop is not None:
                del unsent.token_ids[len(unsent.token_ids) - num_after :]
                self.scheduler.cut(request, num_after)
                return

    def close(self, request: Request, now: float) -> None:
        """Give the sink of an ended request its last delta."""
        request.times.finished = now
        if not request.times.first_token:
            request.times.first_token = now
        delta = request.unsent or Delta(request, "", [])
        request.unsent = None
        stream = request.text_stream
        try:
            if stream is not None:
                if not request.wants_tokens:
                    output_ids = request.output_ids
                    is_trimmed = output_ids and _is_trimmed_stop(request, output_ids[-1])
                    delta.text = stream.push(output_ids[:-1] if is_trimmed else output_ids)
                delta.text += stream.finish()
        except Exception as error:  # noqa: BLE001 - as in deliver
            request.finish_reason = _refusal(error)
        if not request.stream:
            delta.token_ids = request.output_ids
        delta.finish_reason = request.finish_reason
        try:
            request.sink(delta)
        except Exception:
            logger.exception("the receiver of request %s failed", request.rid)

    def _end(self, request: Request, reason: FinishReason, outcome: Outcome) -> None:
        """What the text says goes before whatever else ended the request with the same token."""
        if request.status is Status.RUNNING:
            self.scheduler.finish(request, reason)
            outcome.finished.append(request)
        else:
            request.finish_reason = reason

    def _add_prompt_logprobs(self, values: PromptLogprobs) -> None:
        request, collected = values.request, values.request.input_logprobs
        assert collected is not None
        next_position = request.logprob_start_len + len(collected.token)
        first, stop = next_position - values.start - 1, len(values.chosen)  # a retracted prompt repeats some
        if first < stop:
            token_ids = request.input_ids[next_position : values.start + 1 + stop]
            _joined(collected, logprobs_of(values, first, token_ids, request))


def _refusal(error: Exception) -> FinishReason:
    """A stop regex that takes too long is the client's doing; anything else is ours."""
    if isinstance(error, InvalidRequest):
        return FinishReason("abort", message=str(error), status_code=error.status_code)
    logger.error("a request's text could not be made or sent", exc_info=error)
    return FinishReason("abort", message=f"{type(error).__name__}: {error}", status_code=500)


def _is_trimmed_stop(request: Request, token: int) -> bool:
    """Is `token` the stop token that ended the request, and not part of its text?"""
    reason = request.finish_reason
    return (
        reason is not None
        and reason.type == "stop"
        and reason.matched == token
        and not request.sampling_params.no_stop_trim
    )


def _joined(logprobs: Logprobs | None, more: Logprobs) -> Logprobs:
    if logprobs is None:
        return more
    logprobs.token += more.token
    logprobs.top += more.top
    logprobs.token_ids += more.token_ids
    return logprobs

"""`meta_info`, SGLang's account of an answer: its costs, times and their causes, and its log-probabilities."""

from typing import Any

from engine.engine import TokenizerFacade
from engine.state import Delta, FinishReason, Logprobs, RequestState, TokenLogprob
from server.reading.protocol import JSON


def hidden_states_of(state: RequestState, num_output_tokens: int) -> list[Any]:
    """Return SGLang's list: of the prompt, [tokens, hidden], then a vector of each output token but the last."""
    states = state.hidden_states
    if states is None:
        return []
    stop = state.prompt_len + max(num_output_tokens - 1, 0)
    return [states[: state.prompt_len].tolist(), *states[state.prompt_len : stop].tolist()]


def last_hidden_state(state: RequestState, num_output_tokens: int) -> list[float]:
    """Return the last vector of that list; an empty one if none but the prompt's were computed."""
    if state.hidden_states is None or num_output_tokens < 2:
        return []
    last: list[float] = state.hidden_states[state.prompt_len + num_output_tokens - 2].tolist()
    return last


class MetaInfo:
    def __init__(self, tokenizer: TokenizerFacade, with_text: bool = False) -> None:
        self.tokenizer, self.with_text = tokenizer, with_text  # with_text: in log-probabilities

    def answer(self, delta: Delta) -> JSON:
        """Return the answer of a request that does not stream."""
        meta = self.counts(delta.state, len(delta.token_ids), delta.finish_reason)
        if delta.state.return_logprob:
            meta |= self.logprobs(delta.state, delta.logprobs or Logprobs(), len(delta.token_ids))
        if delta.state.return_hidden_states:
            meta["hidden_states"] = hidden_states_of(delta.state, len(delta.token_ids))
        return {"text": delta.text, "output_ids": delta.token_ids, "meta_info": meta}

    def counts(self, state: RequestState, num_output_tokens: int, reason: FinishReason | None) -> JSON:
        """Return the counts, and the times, in seconds, once there is a `reason`."""
        meta: JSON = {
            "id": state.rid,
            "finish_reason": reason and reason.to_dict(num_output_tokens),
            "prompt_tokens": state.prompt_len,
            "cached_tokens": state.num_cached_tokens,
            "completion_tokens": num_output_tokens,
        }
        if reason is None:
            return meta
        times = state.times
        meta["completion_tokens_wo_jump_forward"] = num_output_tokens - state.num_forced_tokens
        meta["total_retractions"] = state.num_retractions
        meta["first_missed_token"] = self._first_missed(state) if times.scheduled else None
        if times.scheduled:
            meta["queue_time"] = times.scheduled - times.arrived
            if times.first_token >= times.scheduled:
                meta["prefill_time"] = times.first_token - times.scheduled
        if times.finished:
            if times.first_token:
                meta["decode_time"] = times.finished - times.first_token
            meta["e2e_latency"] = times.finished - times.arrived
        return meta

    def _first_missed(self, state: RequestState) -> JSON | None:
        """Return the first token not found in the cache. None if only the last was computed, for its logits."""
        position = state.num_cached_tokens
        if position >= state.prompt_len - 1:
            return None
        token_id = state.request.input_ids[position]
        return {"position": position, "token_id": token_id, "text": self.tokenizer.token_text(token_id)}

    def logprobs(self, state: RequestState, output: Logprobs, num_output_tokens: int) -> JSON:
        """Return the log-probabilities of the prompt, and `output`, which may be the newest of `num_output_tokens`."""
        prompt = state.input_logprobs or Logprobs()
        meta: JSON = {
            "input_token_logprobs": self._triples(prompt.token),
            "output_token_logprobs": self._triples(output.token),
            "output_token_logprobs_length": num_output_tokens,
        }
        if state.top_logprobs_num:
            meta["input_top_logprobs"] = [self._triples(row) for row in prompt.top]
            meta["output_top_logprobs"] = [self._triples(row) for row in output.top]
        if state.token_ids_logprob:
            meta["input_token_ids_logprobs"] = [self._triples(row) for row in prompt.token_ids]
            meta["output_token_ids_logprobs"] = [self._triples(row) for row in output.token_ids]
        return meta

    def _triples(self, entries: list[TokenLogprob] | None) -> list[tuple[float | None, int, str | None]] | None:
        if entries is None:
            return None
        text = self.tokenizer.token_text
        return [(logprob, token, text(token) if self.with_text else None) for logprob, token in entries]

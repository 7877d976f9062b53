"""Checks of a request against the model, before it is queued."""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from engine.config import EngineConfig
from engine.errors import EngineError, InvalidRequest, PromptTooLong
from engine.model_config import ModelConfig
from engine.request import Request
from engine.state import RequestState
from engine.step.pooling import LAST, MEAN


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bound the requests that an engine can compute."""

    vocab_size: int
    context_length: int  # longest prompt + answer in tokens
    is_generation: bool
    returns_hidden_states: bool = False
    makes_text: bool = True
    reads_media: bool = False

    def verify(self, state: RequestState, live_rids: Container[str]) -> None:
        """Raise `InvalidRequest` or `PromptTooLong` with the numbers; otherwise set `state.prompt_ids`.

        `EngineError` if the request should have been prepared and is not.
        """
        request = state.request
        request.sampling_params.verify(self.vocab_size)
        _verify_grammar(state)
        if request.rid in live_rids:
            raise InvalidRequest(f"a request with rid {request.rid!r} is running", "rid")
        self._verify_kind(request)
        if not self.makes_text:
            _verify_stops(request)
        state.prompt_ids = self._verify_prompt(request)
        self._verify_media(request)
        self._verify_logprobs(request)

    def _verify_kind(self, request: Request) -> None:
        if request.pooling is None and not self.is_generation:
            raise InvalidRequest("this server turns prompts into vectors and does not generate", "model")
        if request.pooling is not None and (
            request.pooling not in (LAST, MEAN) or request.sampling_params.max_new_tokens != 0
        ):
            raise InvalidRequest(
                f"pooling must be {LAST} or {MEAN} with max_new_tokens 0, got {request.pooling!r}", "pooling"
            )

        if request.return_hidden_states and not self.returns_hidden_states:
            raise InvalidRequest(
                "return_hidden_states is not supported: the server runs without --enable-return-hidden-states",
                "return_hidden_states",
            )

    def _verify_prompt(self, request: Request) -> np.ndarray:
        """Return the prompt, int32 [prompt_len]."""
        if not request.input_ids:
            raise InvalidRequest("the prompt is empty", "input_ids")
        if request.prompt_len > self.context_length - 1 and request.sampling_params.max_new_tokens != 0:
            raise PromptTooLong(
                f"prompt has {request.prompt_len} tokens, the context is {self.context_length} "
                f"and at least one is left for the answer",
                "input_ids",
                prompt_len=request.prompt_len,
                limit=self.context_length,
            )
        token_ids = np.asarray(request.input_ids, np.int64)
        is_bad = (token_ids < 0) | (token_ids >= self.vocab_size)
        if is_bad.any():
            bad = token_ids[is_bad.argmax()]
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {self.vocab_size}", "input_ids")
        return token_ids.astype(np.int32)

    def _verify_media(self, request: Request) -> None:
        media = request.media
        if media is None or not media.media:
            return
        if not self.reads_media:
            raise InvalidRequest("this model reads text alone, and the prompt has pictures", "media")
        if media.rope is not None and media.rope.max() >= request.prompt_len:
            raise InvalidRequest(
                f"the frames of a video are too far apart: they reach position {media.rope.max()} of a prompt of "
                f"{request.prompt_len} tokens",
                "media",
            )
        if media.prompt_len != request.prompt_len:
            raise InvalidRequest(
                f"the prompt has {request.prompt_len} tokens, its pictures belong to one of {media.prompt_len}", "media"
            )

    def _verify_logprobs(self, request: Request) -> None:
        if not all(0 <= token < self.vocab_size for token in request.token_ids_logprob):
            raise InvalidRequest(
                f"token_ids_logprob has ids outside the vocabulary of {self.vocab_size}", "token_ids_logprob"
            )
        if not 0 <= request.top_logprobs_num <= self.vocab_size:
            raise InvalidRequest(
                f"top_logprobs_num must be from 0 to {self.vocab_size}, got {request.top_logprobs_num}",
                "top_logprobs_num",
            )
        if not -1 <= request.logprob_start_len < request.prompt_len:
            raise InvalidRequest(
                f"logprob_start_len must be -1 or a position of the prompt, which has {request.prompt_len} tokens; "
                f"got {request.logprob_start_len}",
                "logprob_start_len",
            )


def _verify_stops(request: Request) -> None:
    """Raise `InvalidRequest` for stops that only a text can show."""
    for name in ("stop", "stop_regex"):
        if getattr(request.sampling_params, name):
            raise InvalidRequest(
                f"{name} needs the answer's text, and the server runs with --skip-tokenizer-init: use stop_token_ids",
                name,
            )


def limits_of(config: EngineConfig, model: ModelConfig, context_length: int, *, reads_media: bool) -> RequestLimits:
    """Return the limits of an engine that serves `model`."""
    return RequestLimits(
        model.vocab_size,
        context_length,
        model.is_generation and not config.is_embedding,
        returns_hidden_states=config.enable_return_hidden_states,
        makes_text=not config.skip_tokenizer_init,
        reads_media=reads_media,
    )


def _verify_grammar(state: RequestState) -> None:
    request = state.request
    if request.sampling_params.constraint_name is not None and state.matcher is None:
        raise EngineError("a constrained request must be prepared before it is submitted")
    if request.max_thinking_tokens is not None and not request.reasoning_end_ids:
        raise InvalidRequest("max_thinking_tokens needs a model whose answers have an end of reasoning")

"""The fields of an OpenAI body about sampling and the request, in the engine's terms."""

from collections.abc import Sequence
from dataclasses import replace

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from server.http.live import Options
from server.reading.grammars import constraint_of
from server.reading.openai_body import SAMPLING_FIELDS, OpenAIFields


def read_sampling_params(
    body: OpenAIFields, engine: Engine, max_tokens_names: Sequence[str], default_max_tokens: int | None
) -> SamplingParams:
    """Read sampling parameters. Errors name the field as the client spelled it."""
    values = body.given(SAMPLING_FIELDS)
    names = {theirs: SAMPLING_FIELDS[theirs] for theirs in values}
    max_tokens_name = next((name for name in max_tokens_names if getattr(body, name) is not None), None)
    if max_tokens_name is not None:
        names[max_tokens_name], values[max_tokens_name] = "max_new_tokens", getattr(body, max_tokens_name)
    given = {ours: values[theirs] for theirs, ours in names.items()} | constraint_of(body)
    try:
        params = SamplingParams.of_fields({**engine.model_config.sampling_defaults, **given})
        if max_tokens_name is None:
            params = replace(params, max_new_tokens=default_max_tokens)
        params.verify(engine.model_config.vocab_size)
    except InvalidRequest as error:
        theirs = next((theirs for theirs, ours in names.items() if ours == error.field), None)
        if theirs is None:
            raise
        raise InvalidRequest(str(error).replace(str(error.field), theirs), theirs) from None
    return params


def num_alternatives(logprobs: bool, top_logprobs: int) -> int:
    """Return how many alternatives a token a client wants log-probabilities of, -1 for none at all."""
    if top_logprobs and not logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    return top_logprobs if logprobs else -1


def read_options(body: OpenAIFields, num_logprobs: int) -> Options:
    """Read options. `num_logprobs`: alternatives a token; -1: no log-probabilities at all."""
    if body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs is not supported: /v1/completions gives them by echo: true and logprobs", "prompt_logprobs"
        )
    return Options(
        stream=body.stream,
        return_logprob=num_logprobs >= 0,
        top_logprobs_num=max(num_logprobs, 0),
        priority=body.priority,
        extra_key=body.cache_namespace,
        return_hidden_states=body.return_hidden_states,
    )

"""The fields of an OpenAI body about sampling and the request, in the engine's terms."""

from collections.abc import Sequence
from dataclasses import replace

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from server.http.live import Options
from server.reading.grammars import constraint_of
from server.reading.protocol import Fields, cache_namespace, refuse

MAX_TOP_LOGPROBS = 20

# OpenAI's, SGLang's and vLLM's. They would change the answer: better refused than ignored.
UNSUPPORTED = frozenset((
    "functions", "function_call", "audio", "web_search_options",
    "lora_path", "session_params", "custom_logit_processor", "custom_params", "watermark", "bootstrap_host",
    "bootstrap_room", "return_routed_experts", "return_sampling_mask",
    "return_prompt_token_ids", "sampling_logprobs_mode",
    "use_beam_search", "allowed_token_ids", "bad_words", "logits_processors", "logprob_token_ids", "vllm_xargs",
    "truncate_prompt_tokens", "prompt_embeds", "documents", "chat_template", "thinking_token_budget",
    "kv_transfer_params", "repetition_detection", "guided_whitespace_pattern",
))  # fmt: skip

# Fields that go into SamplingParams, under the engine's name where that differs.
SAMPLING_FIELDS = {
    name: name
    for name in (
        "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "stop_regex", "frequency_penalty",
        "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos", "skip_special_tokens",
        "spaces_between_special_tokens", "no_stop_trim",
    )
} | {
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",  # vLLM's
}  # fmt: skip


def read_sampling_params(
    body: Fields, engine: Engine, max_tokens_names: Sequence[str], default_max_tokens: int | None
) -> SamplingParams:
    """Read sampling parameters. Errors name the field as the client spelled it."""
    names = {
        theirs: SAMPLING_FIELDS[theirs] for theirs in body.values if theirs in SAMPLING_FIELDS and body.has(theirs)
    }
    max_tokens_name = next((name for name in max_tokens_names if body.has(name)), None)
    if max_tokens_name is not None:
        names[max_tokens_name] = "max_new_tokens"
    given = {ours: body.get(theirs) for theirs, ours in names.items()}
    given |= constraint_of(body)
    try:
        params = SamplingParams.from_dict(given, engine.sampling_defaults)
        if max_tokens_name is None:
            params = replace(params, max_new_tokens=default_max_tokens)
        params.verify(engine.model_config.vocab_size)
    except InvalidRequest as error:
        theirs = next((theirs for theirs, ours in names.items() if ours == error.field), None)
        if theirs is None:
            raise
        raise InvalidRequest(str(error).replace(str(error.field), theirs), theirs) from None
    return params


def read_options(body: Fields, num_logprobs: int) -> Options:
    """Read options. `num_logprobs`: alternatives a token; -1: no log-probabilities at all."""
    refuse(body, UNSUPPORTED)
    if body.has("prompt_logprobs"):
        raise InvalidRequest(
            "prompt_logprobs is not supported: /v1/completions gives them by echo: true and logprobs", "prompt_logprobs"
        )
    if any(modality != "text" for modality in body.strings("modalities")):
        body.fail("modalities", '["text"]')
    body.one_of("verbosity", ("low", "medium", "high"), "medium")  # a wish that no open model was taught to read
    options = Options(
        stream=body.flag("stream"),
        return_logprob=num_logprobs >= 0,
        top_logprobs_num=max(num_logprobs, 0),
        priority=body.integer("priority"),
        extra_key=cache_namespace(body),
        return_hidden_states=body.flag("return_hidden_states"),
    )
    check_hidden_states(options)
    return options


def check_hidden_states(options: Options) -> None:
    """Refuse to stream them. They come whole: a stream's events would each be megabytes."""
    if options.return_hidden_states and options.stream:
        raise InvalidRequest("return_hidden_states needs stream: false", "return_hidden_states")

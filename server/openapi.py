"""/openapi.json: an OpenAPI 3.1 document of every route, made from the one table here.

A route that the table does not know fails a test, and the fuzzer in the tests sends what the table allows.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import web

from engine.request import TOP_K_ALL
from server.parsers.reasoning import REASONING_ALIASES, REASONING_FORMATS
from server.parsers.tool_calls import TOOL_ALIASES, TOOL_FORMATS
from server.protocol import (
    JSON,
    MAX_INT,
    MAX_N,
    REQUEST_FIELDS,
    ErrorShape,
    anthropic_error,
    error_shape,
    json_response,
    native_error,
    ollama_error,
    openai_error,
)

SCHEMAS = "#/components/schemas/"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route. `body` and `answer` are schemas; an answer of None is no JSON."""

    summary: str
    tag: str
    body: JSON | None = None
    answer: JSON | None = None
    media_type: str = "application/json"  # of the answer
    is_streaming: bool = False  # with `stream`
    stream_type: str = "text/event-stream"  # of a streamed answer
    statuses: tuple[int, ...] = ()  # of errors, besides those any request can meet
    is_open: bool = False  # needs no key
    parameters: tuple[JSON, ...] = ()
    error: JSON | None = None  # if not the API's own shape
    form: JSON | None = None  # schema of a multipart body


# ---- schemas ----


def ref(name: str) -> JSON:
    return {"$ref": SCHEMAS + name}


def obj(properties: dict[str, JSON], required: Iterable[str] = (), **more: Any) -> JSON:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def array(items: JSON, **more: Any) -> JSON:
    return {"type": "array", "items": items, **more}


def integer(low: int = -MAX_INT, high: int = MAX_INT) -> JSON:
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float) -> JSON:
    return {"type": "number", "minimum": low, "maximum": high}


def one_of(*schemas: JSON) -> JSON:
    return {"anyOf": list(schemas)}


def or_list(schema: JSON) -> JSON:
    return one_of(schema, array(schema))


STRING, BOOLEAN, ANY_OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}


def path_parameter(name: str) -> tuple[JSON, ...]:
    return ({"name": name, "in": "path", "required": True, "schema": STRING},)


TOKEN_IDS = array(integer(0), minItems=1)
LOGPROBS = array({"type": "array"})

SAMPLING: dict[str, JSON] = {
    "temperature": number(0, 100),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": one_of({"const": -1}, integer(1, TOP_K_ALL)),
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
    "logit_bias": {
        "type": "object",
        "additionalProperties": number(-100, 100),
        "propertyNames": {"type": "string", "pattern": "^[0-9]{1,6}$"},
        "description": "token id to what is added to its logit",
    },
    "stop": or_list(STRING),
    "stop_token_ids": array(integer(0)),
    "stop_regex": or_list(STRING),
    "n": integer(1, MAX_N),
    "ignore_eos": BOOLEAN,
    "skip_special_tokens": BOOLEAN,
    "spaces_between_special_tokens": BOOLEAN,
    "no_stop_trim": BOOLEAN,
    "json_schema": {**one_of(ANY_OBJECT, STRING), "description": "the answer is JSON of this schema"},
    "regex": {"type": "string", "description": "the answer matches it"},
    "ebnf": {"type": "string", "description": "a grammar, in GBNF or Lark"},
    "structural_tag": one_of(ANY_OBJECT, STRING),
}
NATIVE_SAMPLING = {
    **SAMPLING,
    "choice": array(STRING, minItems=1),
    "max_new_tokens": one_of(integer(0), {"type": "null"}),
    "min_new_tokens": integer(0),
    "sampling_seed": integer(),
}
EVERYWHERE: dict[str, JSON] = {
    "stream": BOOLEAN,
    "rid": {"type": "string", "description": "name of the request, for /abort_request"},
    "priority": {**integer(), "description": "larger runs first"},
    "extra_key": {"type": "string", "description": "cached prefixes are shared within one key only"},
    "cache_salt": {"type": "string", "description": "as extra_key"},
}
OPENAI_BOTH: dict[str, JSON] = {
    **SAMPLING,
    **EVERYWHERE,
    "model": STRING,
    "max_tokens": integer(0),
    "min_tokens": integer(0),
    "seed": integer(),
    "stream_options": obj(
        {
            "include_usage": BOOLEAN,
            "continuous_usage_stats": {"type": "boolean", "description": "with include_usage: in each chunk"},
        }
    ),
    "add_special_tokens": {"type": "boolean", "description": "to texts; default: prompts yes, conversations no"},
    "include_stop_str_in_output": {"type": "boolean", "description": "as no_stop_trim"},
    "return_token_ids": {"type": "boolean", "description": "`prompt_token_ids` and `token_ids` of each choice"},
    "return_tokens_as_token_ids": {"type": "boolean", "description": "in log-probabilities: token_id:17"},
    "return_meta_info": {"type": "boolean", "description": "with each choice, what /generate tells in `meta_info`"},
    "user": STRING,
    "response_format": obj(
        {
            "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
            "json_schema": obj({"name": STRING, "schema": ANY_OBJECT, "strict": BOOLEAN}, ["schema"]),
        },
        ["type"],
    ),
    "structured_outputs": obj(
        {
            "json": one_of(ANY_OBJECT, STRING),
            "regex": STRING,
            "choice": array(STRING, minItems=1),
            "grammar": STRING,
            "structural_tag": one_of(ANY_OBJECT, STRING),
            "json_object": BOOLEAN,
        }
    ),
    "guided_json": one_of(ANY_OBJECT, STRING),
    "guided_regex": STRING,
    "guided_choice": array(STRING, minItems=1),
    "guided_grammar": STRING,
}
TEXT_PART = obj({"type": {"enum": ["text", "input_text"]}, "text": STRING}, ["type", "text"])
FUNCTION_CALL = obj({"name": STRING, "arguments": one_of(STRING, ANY_OBJECT)}, ["name"])
TOOL_CALL = obj({"id": STRING, "type": {"const": "function"}, "function": FUNCTION_CALL}, ["function"])
TOOL = obj(
    {
        "type": {"const": "function"},
        "function": obj(
            {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_]{1,64}$"},
                "description": STRING,
                "parameters": {**ANY_OBJECT, "description": "JSON schema of an object"},
                "strict": BOOLEAN,
            },
            ["name"],
        ),
    },
    ["type", "function"],
)
MESSAGE = obj(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": one_of(STRING, array(TEXT_PART)),
        "name": STRING,
        "tool_calls": array(TOOL_CALL),
        "tool_call_id": STRING,
        "reasoning_content": STRING,
    },
    ["role", "content"],
)
CHAT: dict[str, JSON] = {
    "messages": array(ref("Message"), minItems=1),
    "tools": array(TOOL),
    "tool_choice": one_of(
        {"enum": ["auto", "none", "required"]},
        obj({"type": {"const": "function"}, "function": obj({"name": STRING}, ["name"])}, ["function"]),
    ),
    "parallel_tool_calls": BOOLEAN,
    "reasoning_effort": one_of(
        {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"]},
        number(0, 0.99),
    ),
    "max_thinking_tokens": {**integer(0), "description": "of reasoning, which is ended after so many"},
    "separate_reasoning": {"type": "boolean", "description": "reasoning in `reasoning_content`; default: true"},
    "stream_reasoning": {"type": "boolean", "description": "as it comes, not when it has ended; default: true"},
    "chat_template_kwargs": ANY_OBJECT,
    "thinking": obj({"type": {"enum": ["enabled", "adaptive", "disabled"]}}),
    "input_ids": {**TOKEN_IDS, "description": "in place of what the template makes of the messages"},
    "add_generation_prompt": BOOLEAN,
    "continue_final_message": BOOLEAN,
}
USAGE = obj(
    {
        "prompt_tokens": integer(0),
        "completion_tokens": integer(0),
        "total_tokens": integer(0),
        "prompt_tokens_details": obj({"cached_tokens": integer(0)}),
        "completion_tokens_details": obj({"reasoning_tokens": integer(0)}),
    },
    ["prompt_tokens", "completion_tokens", "total_tokens"],
)
META_INFO = obj(
    {
        "id": STRING,
        "finish_reason": one_of(obj({"type": {"enum": ["stop", "length", "abort"]}}, ["type"]), {"type": "null"}),
        "prompt_tokens": integer(0),
        "cached_tokens": integer(0),
        "completion_tokens": integer(0),
        "total_retractions": integer(0),
        "queue_time": {"type": "number", "description": "seconds until its first step"},
        "prefill_time": {"type": "number", "description": "seconds from there to the first token"},
        "decode_time": {"type": "number", "description": "seconds from there to the end"},
        "e2e_latency": {"type": "number"},
        "first_missed_token": {
            **one_of(obj({"position": integer(0), "token_id": integer(0), "text": STRING}), {"type": "null"}),
            "description": "where the prompt left what was cached",
        },
        "input_token_logprobs": LOGPROBS,
        "output_token_logprobs": LOGPROBS,
    },
    ["id", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens"],
)
OPENAI_ANSWER = obj(
    {
        "id": STRING,
        "object": STRING,
        "created": integer(0),
        "model": STRING,
        "choices": array(ANY_OBJECT),
        "usage": ref("Usage"),
    },
    ["id", "object", "created", "model", "choices", "usage"],
)
MODEL_CARD = obj({"id": STRING, "object": {"const": "model"}, "max_model_len": integer(1)}, ["id", "object"])

SHARED_FIELDS: dict[str, JSON] = {name: EVERYWHERE[name] for name in ("stream", *REQUEST_FIELDS)} | {"model": STRING}

ANTHROPIC_TEXT = obj({"type": {"const": "text"}, "text": STRING}, ["type", "text"])
ANTHROPIC_BLOCK = one_of(
    ANTHROPIC_TEXT,
    obj({"type": {"const": "thinking"}, "thinking": STRING, "signature": STRING}, ["type", "thinking"]),
    obj({"type": {"const": "tool_use"}, "id": STRING, "name": STRING, "input": ANY_OBJECT}, ["type", "id", "name"]),
    obj(
        {
            "type": {"const": "tool_result"},
            "tool_use_id": STRING,
            "content": one_of(STRING, array(ANTHROPIC_TEXT)),
            "is_error": BOOLEAN,
        },
        ["type", "tool_use_id"],
    ),
)
ANTHROPIC_TOOL = obj({"name": STRING, "description": STRING, "input_schema": ANY_OBJECT}, ["name", "input_schema"])
MESSAGES: dict[str, JSON] = {
    **SHARED_FIELDS,
    "messages": array(
        obj(
            {"role": {"enum": ["user", "assistant", "system"]}, "content": one_of(STRING, array(ANTHROPIC_BLOCK))},
            ["role", "content"],
        ),
        minItems=1,
    ),
    "system": one_of(STRING, array(ANTHROPIC_TEXT)),
    "tools": array(ANTHROPIC_TOOL),
    "tool_choice": obj(
        {"type": {"enum": ["auto", "any", "tool", "none"]}, "name": STRING, "disable_parallel_tool_use": BOOLEAN},
        ["type"],
    ),
    "thinking": obj({"type": {"enum": ["enabled", "adaptive", "disabled"]}, "budget_tokens": integer(1)}, ["type"]),
    "output_config": obj(
        {"effort": STRING, "format": obj({"type": {"const": "json_schema"}, "schema": ANY_OBJECT}, ["type", "schema"])}
    ),
}
MESSAGES_SAMPLING: dict[str, JSON] = {
    **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k")},
    "max_tokens": integer(0),
    "stop_sequences": array(STRING),
    "metadata": ANY_OBJECT,
}

RESPONSES_PART = obj({"type": {"enum": ["input_text", "output_text"]}, "text": STRING}, ["type", "text"])
RESPONSES_TEXT = one_of(STRING, array(RESPONSES_PART))
RESPONSES_ITEM = one_of(
    obj(
        {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": RESPONSES_TEXT}, ["role", "content"]
    ),
    obj(
        {"type": {"const": "function_call"}, "call_id": STRING, "name": STRING, "arguments": STRING},
        ["type", "call_id", "name", "arguments"],
    ),
    obj(
        {"type": {"const": "function_call_output"}, "call_id": STRING, "output": RESPONSES_TEXT},
        ["type", "call_id", "output"],
    ),
    obj(
        {
            "type": {"const": "reasoning"},
            "content": array(obj({"type": {"const": "reasoning_text"}, "text": STRING}, ["type", "text"])),
        },
        ["type"],
    ),
)
RESPONSES_REQUEST = obj(
    {
        **SHARED_FIELDS,
        **{name: SAMPLING[name] for name in ("temperature", "top_p")},
        "input": one_of(STRING, array(RESPONSES_ITEM, minItems=1)),
        "instructions": STRING,
        "max_output_tokens": integer(1),
        "previous_response_id": STRING,
        "store": {
            "type": "boolean",
            "description": "keep the answer in memory, as long as there is room; default: true",
        },
        "background": {"type": "boolean", "description": "answer at once, with an id to ask for later"},
        "tools": array(
            obj({"type": {"const": "function"}, "name": STRING, "parameters": ANY_OBJECT}, ["type", "name"])
        ),
        "tool_choice": one_of(
            {"enum": ["auto", "none", "required"]},
            obj({"type": {"const": "function"}, "name": STRING}, ["type", "name"]),
        ),
        "parallel_tool_calls": BOOLEAN,
        "reasoning": obj({"effort": STRING}),
        "text": obj(
            {
                "format": obj(
                    {"type": {"enum": ["text", "json_object", "json_schema"]}, "name": STRING, "schema": ANY_OBJECT},
                    ["type"],
                )
            }
        ),
        "truncation": {"const": "disabled"},
        "metadata": {"type": "object", "additionalProperties": STRING},
        "user": STRING,
    },
    ["input"],
)

OLLAMA_MESSAGE = obj(
    {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": STRING,
        "thinking": STRING,
        "tool_name": STRING,
        "tool_calls": array(obj({"function": obj({"name": STRING, "arguments": ANY_OBJECT}, ["name"])}, ["function"])),
    },
    ["role", "content"],
)
OLLAMA_BOTH: dict[str, JSON] = {
    **SHARED_FIELDS,
    "options": obj(
        {
            **{
                name: SAMPLING[name]
                for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "stop")
            },
            "num_predict": integer(),
            "top_k": integer(0, TOP_K_ALL),
            "seed": integer(),
            "repeat_penalty": SAMPLING["repetition_penalty"],
        }
    ),
    "format": one_of({"const": "json"}, ANY_OBJECT),
    "think": one_of(BOOLEAN, {"enum": ["low", "medium", "high"]}),
    "keep_alive": one_of(STRING, integer()),
}
PROMPTS = one_of(STRING, TOKEN_IDS, array(STRING, minItems=1), array(TOKEN_IDS, minItems=1))
POOLED: dict[str, JSON] = {"model": STRING, **{name: EVERYWHERE[name] for name in EVERYWHERE if name != "stream"}}

COMPONENTS: dict[str, JSON] = {
    "SamplingParams": obj(NATIVE_SAMPLING, additionalProperties=False),
    "GenerateRequest": obj(
        {
            **EVERYWHERE,
            "text": {**or_list(STRING), "description": "the prompt or prompts; give this or input_ids"},
            "input_ids": one_of(TOKEN_IDS, array(TOKEN_IDS, minItems=1)),
            "sampling_params": one_of(ref("SamplingParams"), array(ref("SamplingParams"))),
            "return_logprob": one_of(BOOLEAN, array(BOOLEAN)),
            "logprob_start_len": one_of(integer(-1), array(integer(-1))),
            "top_logprobs_num": one_of(integer(0, 1024), array(integer(0, 1024))),
            "token_ids_logprob": array(integer(0)),
            "return_text_in_logprobs": BOOLEAN,
            "max_thinking_tokens": integer(0),
            "require_reasoning": BOOLEAN,
            "session_params": obj(
                {
                    "id": STRING,
                    "rid": STRING,
                    "offset": integer(-1),
                    "replace": BOOLEAN,
                    "drop_previous_output": BOOLEAN,
                },
                ["id"],
            ),
        }
    ),
    "MetaInfo": META_INFO,
    "GenerateAnswer": obj(
        {"text": STRING, "output_ids": array(integer(0)), "meta_info": ref("MetaInfo"), "index": integer(0)},
        ["text", "output_ids", "meta_info"],
    ),
    "Message": MESSAGE,
    "CompletionRequest": obj(
        {
            **OPENAI_BOTH,
            "prompt": PROMPTS,
            "logprobs": integer(0, 20),
            "echo": BOOLEAN,
            "best_of": integer(1),
        },
        ["prompt"],
    ),
    "ChatRequest": obj(
        {
            **OPENAI_BOTH,
            **CHAT,
            "max_completion_tokens": integer(0),
            "logprobs": BOOLEAN,
            "top_logprobs": integer(0, 20),
        },
        ["messages"],
    ),
    "Usage": USAGE,
    "OpenAIAnswer": OPENAI_ANSWER,
    "ModelCard": MODEL_CARD,
    "TokenizeRequest": obj({**CHAT, "prompt": or_list(STRING), "text": or_list(STRING), "add_special_tokens": BOOLEAN}),
    "DetokenizeRequest": obj(
        {"tokens": one_of(TOKEN_IDS, array(TOKEN_IDS, minItems=1)), "skip_special_tokens": BOOLEAN}, ["tokens"]
    ),
    "ParseFunctionCallRequest": obj(
        {"text": STRING, "tools": array(TOOL), "tool_call_parser": {"enum": [*TOOL_FORMATS, *TOOL_ALIASES]}},
        ["text", "tools", "tool_call_parser"],
    ),
    "SeparateReasoningRequest": obj(
        {"text": STRING, "reasoning_parser": {"enum": [*REASONING_FORMATS, *REASONING_ALIASES]}},
        ["text", "reasoning_parser"],
    ),
    "AbortRequest": obj({"rid": STRING, "abort_all": BOOLEAN}),
    "Health": obj(
        {
            "status": {"enum": ["ok", "starting", "stuck", "stopping", "stopped"]},
            "last_step_age_s": {"type": "number"},
            "oldest_queued_s": {"type": "number"},
            "num_running": integer(0),
            "num_queued": integer(0),
        },
        ["status"],
    ),
    "File": obj(
        {
            "id": STRING,
            "object": {"const": "file"},
            "bytes": integer(0),
            "created_at": integer(0),
            "filename": STRING,
            "purpose": STRING,
            "status": STRING,
        },
        ["id", "object", "bytes", "created_at", "filename", "purpose"],
    ),
    "BatchRequest": obj(
        {
            "input_file_id": STRING,
            "endpoint": {"enum": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]},
            "completion_window": {
                "type": "string",
                "description": "such as 24h; lines not answered by then are errors",
            },
            "metadata": {"type": "object", "additionalProperties": STRING},
        },
        ["input_file_id", "endpoint"],
    ),
    "Batch": obj(
        {
            "id": STRING,
            "object": {"const": "batch"},
            "endpoint": STRING,
            "input_file_id": STRING,
            "status": STRING,
            "created_at": integer(0),
            "request_counts": ANY_OBJECT,
        },
        ["id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at", "request_counts"],
    ),
    "EmbeddingsRequest": obj(
        {
            **POOLED,
            "input": PROMPTS,
            "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": {
                **integer(1),
                "description": "numbers of the vector to keep, which is then of length 1 again",
            },
        },
        ["input"],
    ),
    "Embeddings": obj(
        {
            "object": {"const": "list"},
            "data": array(obj({"index": integer(0)}, ["object", "index", "embedding"])),
            "model": STRING,
            "usage": ref("Usage"),
        },
        ["object", "data", "model", "usage"],
    ),
    "EncodeRequest": obj({**POOLED, "text": or_list(STRING), "input_ids": one_of(TOKEN_IDS, array(TOKEN_IDS))}),
    "Encoded": obj({"embedding": array({"type": "number"}), "meta_info": ref("MetaInfo")}, ["embedding", "meta_info"]),
    "ClassifyRequest": obj({**POOLED, "input": PROMPTS}, ["input"]),
    "RerankRequest": obj(
        {
            **POOLED,
            "query": STRING,
            "documents": array(STRING, minItems=1),
            "top_n": integer(1),
            "return_documents": BOOLEAN,
        },
        ["query", "documents"],
    ),
    "ScoreRequest": one_of(
        obj({**POOLED, "text_1": or_list(STRING), "text_2": or_list(STRING)}, ["text_1", "text_2"]),
        obj(
            {
                **POOLED,
                "query": STRING,
                "items": or_list(STRING),
                "label_token_ids": TOKEN_IDS,
                "apply_softmax": BOOLEAN,
                "item_first": BOOLEAN,
            },
            ["items", "label_token_ids"],
        ),
    ),
    "OpenSession": obj({"capacity_of_str_len": integer(0), "session_id": STRING}),
    "CloseSession": obj({"session_id": STRING}, ["session_id"]),
    "PauseRequest": obj({"mode": {"enum": ["abort", "retract", "in_place"]}}),
    "UpdateWeightsRequest": obj(
        {
            "model_path": STRING,
            "load_format": {"enum": ["auto", "safetensors", "gguf", "dummy"]},
            "abort_all_requests": BOOLEAN,
            "flush_cache": BOOLEAN,
            "weight_version": STRING,
        },
        ["model_path"],
    ),
    "UpdateVersionRequest": obj({"new_version": STRING, "abort_all_requests": BOOLEAN}, ["new_version"]),
    "WeightRequest": obj({"name": STRING, "truncate_size": integer(1, 4096)}, ["name"]),
    "MemoryRequest": obj({"tags": array({"enum": ["kv_cache", "weights"]})}),
    "Done": obj({"message": STRING}, ["message"]),
    "NativeError": obj(
        {"error": obj({"message": STRING, "code": integer(400, 599), "field": STRING}, ["message", "code"])}, ["error"]
    ),
    "OpenAIError": obj(
        {"error": obj({"message": STRING, "type": STRING, "param": {}, "code": {}}, ["message", "type"])}, ["error"]
    ),
}
COMPONENTS |= {
    "MessagesRequest": obj({**MESSAGES, **MESSAGES_SAMPLING}, ["max_tokens", "messages"]),
    "CountTokensRequest": obj(MESSAGES, ["messages"]),
    "AnthropicMessage": obj(
        {
            "id": STRING,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "content": array(ANY_OBJECT),
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": one_of(STRING, {"type": "null"}),
            "usage": obj(
                {"input_tokens": integer(0), "cache_read_input_tokens": integer(0), "output_tokens": integer(0)},
                ["input_tokens", "output_tokens"],
            ),
        },
        ["id", "type", "role", "content", "model", "stop_reason", "usage"],
    ),
    "AnthropicError": obj(
        {"type": {"const": "error"}, "error": obj({"type": STRING, "message": STRING}, ["type", "message"])},
        ["type", "error"],
    ),
    "ResponsesRequest": RESPONSES_REQUEST,
    "Response": obj(
        {
            "id": STRING,
            "object": {"const": "response"},
            "status": {"enum": ["completed", "incomplete", "failed", "cancelled", "queued", "in_progress"]},
            "output": array(ANY_OBJECT),
            "usage": one_of(ANY_OBJECT, {"type": "null"}),
        },
        ["id", "object", "status", "output", "usage"],
    ),
    "OllamaChatRequest": obj({**OLLAMA_BOTH, "messages": array(OLLAMA_MESSAGE), "tools": array(ANY_OBJECT)}),
    "OllamaGenerateRequest": obj({**OLLAMA_BOTH, "prompt": STRING, "system": STRING, "raw": BOOLEAN}),
    "OllamaAnswer": obj(
        {
            "model": STRING,
            "created_at": STRING,
            "message": obj({"role": {"const": "assistant"}, "content": STRING}, ["role", "content"]),
            "response": STRING,
            "done": BOOLEAN,
            "done_reason": STRING,
        },
        ["model", "created_at", "done", "done_reason"],
    ),
    "OllamaError": obj({"error": STRING}, ["error"]),
}

# ---- the table ----

GENERATE = Operation(
    "Answer one prompt or many", "SGLang", ref("GenerateRequest"),
    one_of(ref("GenerateAnswer"), array(ref("GenerateAnswer"))), is_streaming=True, statuses=(429,),
)  # fmt: skip
FLUSH = Operation(
    "Forget every cached prefix, unless something runs", "server", media_type="text/plain", statuses=(400,)
)
ABORT = Operation("End a request, or all", "server", ref("AbortRequest"), media_type="text/plain")
START_PROFILE = Operation("Begin to record what host and device do", "server", media_type="text/plain", statuses=(400,))
STOP_PROFILE = Operation("Write what was recorded to a file", "server", answer=obj({"path": STRING}), statuses=(400,))
MODEL_INFO = Operation("About the model", "server", answer=ANY_OBJECT)
SERVER_INFO = Operation("Every option, and what it was resolved to", "server", answer=ANY_OBJECT)
HEALTH_ERROR = one_of(ref("Health"), ref("NativeError"))
HEALTH = Operation(
    "Judged by the age of the last step and of the oldest queued request", "server", answer=ref("Health"),
    statuses=(503,), is_open=True, error=HEALTH_ERROR,
)  # fmt: skip
TOKENIZE = Operation("Token ids of texts, or of a conversation", "tokens", ref("TokenizeRequest"), ANY_OBJECT)
DETOKENIZE = Operation(
    "Text of token ids",
    "tokens",
    ref("DetokenizeRequest"),
    obj({"text": or_list(STRING), "prompt": {**or_list(STRING), "description": "the same, vLLM's name"}}, ["text"]),
)
COMPLETIONS = Operation(
    "Complete prompts", "OpenAI", ref("CompletionRequest"), ref("OpenAIAnswer"), is_streaming=True, statuses=(404, 429)
)
CHAT_COMPLETIONS = Operation(
    "Answer a conversation", "OpenAI", ref("ChatRequest"), ref("OpenAIAnswer"), is_streaming=True, statuses=(404, 429)
)
RENDER = Operation(
    "The prompt that a conversation makes", "OpenAI", ref("ChatRequest"),
    obj({"prompt": STRING, "prompt_token_ids": TOKEN_IDS}, ["prompt", "prompt_token_ids"]), statuses=(404,),
)  # fmt: skip
PARSE_FUNCTION_CALL = Operation(
    "Tool calls in a text", "tokens", ref("ParseFunctionCallRequest"),
    obj({"normal_text": STRING, "calls": array(ANY_OBJECT)}, ["normal_text", "calls"]),
)  # fmt: skip
SEPARATE_REASONING = Operation(
    "Reasoning in a text", "tokens", ref("SeparateReasoningRequest"),
    obj({"reasoning_text": STRING, "text": STRING}, ["reasoning_text", "text"]),
)  # fmt: skip
MODELS = Operation("The models there are", "OpenAI", answer=obj({"data": array(ref("ModelCard"))}, ["data"]))
MODEL = Operation(
    "One model", "OpenAI", answer=ref("ModelCard"), statuses=(404,),
    parameters=path_parameter("model"),
)  # fmt: skip


def page(name: str) -> JSON:
    return obj({"object": {"const": "list"}, "data": array(ref(name)), "has_more": BOOLEAN}, ["data", "has_more"])


PAGE_PARAMETERS = (
    {"name": "limit", "in": "query", "schema": integer(1)},
    {"name": "after", "in": "query", "schema": STRING},
)
UPLOAD = Operation(
    "Store the lines of a batch", "OpenAI", answer=ref("File"), statuses=(400, 403, 413, 503),
    form=obj({"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch"]}}, ["file", "purpose"]),
)  # fmt: skip
CREATE_BATCH = Operation(
    "Answer the lines of a file when nothing more urgent is to be done", "OpenAI", ref("BatchRequest"), ref("Batch"),
    statuses=(404, 503),
)  # fmt: skip

MESSAGE_ANSWER = Operation(
    "Anthropic's messages", "Anthropic", ref("MessagesRequest"), ref("AnthropicMessage"), is_streaming=True,
    statuses=(404, 429),
)  # fmt: skip
COUNT_TOKENS = Operation(
    "Tokens of a conversation's prompt", "Anthropic", ref("CountTokensRequest"),
    obj({"input_tokens": integer(1)}, ["input_tokens"]), statuses=(404,),
)  # fmt: skip
CREATE_RESPONSE = Operation(
    "OpenAI's responses", "OpenAI", ref("ResponsesRequest"), ref("Response"), is_streaming=True, statuses=(404, 429)
)
RESPONSE_ID = ({"name": "response_id", "in": "path", "required": True, "schema": STRING},)
RESPONSE = Operation("A stored response", "OpenAI", answer=ref("Response"), statuses=(400, 404), parameters=RESPONSE_ID)
CANCEL_RESPONSE = Operation(
    "End a background response", "OpenAI", answer=ref("Response"), statuses=(400, 404), parameters=RESPONSE_ID
)
DELETE_RESPONSE = Operation(
    "Forget a response", "OpenAI", answer=obj({"deleted": BOOLEAN}), statuses=(404,), parameters=RESPONSE_ID
)
NDJSON = "application/x-ndjson"
OLLAMA_CHAT = Operation(
    "Ollama's chat", "Ollama", ref("OllamaChatRequest"), ref("OllamaAnswer"), is_streaming=True, stream_type=NDJSON,
    statuses=(404, 429),
)  # fmt: skip
OLLAMA_GENERATE = Operation(
    "Ollama's completion", "Ollama", ref("OllamaGenerateRequest"), ref("OllamaAnswer"), is_streaming=True,
    stream_type=NDJSON, statuses=(404, 429),
)  # fmt: skip
OLLAMA_SHOW = Operation(
    "About the model", "Ollama", obj({"model": STRING}), obj({"capabilities": array(STRING)}), statuses=(404,)
)
OLLAMA_MODELS = obj({"models": array(ANY_OBJECT)}, ["models"])
EMBEDDINGS = Operation(
    "Vectors of length 1", "OpenAI", ref("EmbeddingsRequest"), ref("Embeddings"), statuses=(404, 429)
)
ENCODE = Operation(
    "Vectors of length 1", "SGLang", ref("EncodeRequest"), one_of(ref("Encoded"), array(ref("Encoded"))),
    statuses=(429,),
)  # fmt: skip
CLASSIFY = dataclasses.replace(ENCODE, summary="Scores of a model with a classification head")
CLASSIFY_WITH_LABELS = Operation(
    "Probabilities of a classifier's labels", "OpenAI", ref("ClassifyRequest"), ANY_OBJECT, statuses=(404, 429)
)
RERANK = Operation("Documents, best first", "OpenAI", ref("RerankRequest"), ANY_OBJECT, statuses=(404, 429))
RERANK_FOR_SGLANG = dataclasses.replace(RERANK, answer=array(ANY_OBJECT))
SCORE = Operation(
    "How well texts fit, or how likely tokens follow", "OpenAI", ref("ScoreRequest"), ANY_OBJECT, statuses=(404, 429)
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/generate"): GENERATE,
    ("PUT", "/generate"): GENERATE,
    ("POST", "/v1/chat/completions"): CHAT_COMPLETIONS,
    ("POST", "/v1/chat/completions/render"): RENDER,
    ("POST", "/v1/completions"): COMPLETIONS,
    ("GET", "/v1/models"): MODELS,
    ("GET", "/v1/models/{model}"): MODEL,
    ("POST", "/v1/messages"): MESSAGE_ANSWER,
    ("POST", "/v1/messages/count_tokens"): COUNT_TOKENS,
    ("POST", "/v1/responses"): CREATE_RESPONSE,
    ("GET", "/v1/responses/{response_id}"): RESPONSE,
    ("DELETE", "/v1/responses/{response_id}"): DELETE_RESPONSE,
    ("POST", "/v1/responses/{response_id}/cancel"): CANCEL_RESPONSE,
    ("POST", "/api/chat"): OLLAMA_CHAT,
    ("POST", "/api/generate"): OLLAMA_GENERATE,
    ("POST", "/api/show"): OLLAMA_SHOW,
    ("GET", "/api/tags"): Operation("The models there are", "Ollama", answer=OLLAMA_MODELS),
    ("GET", "/api/ps"): Operation("The models in memory", "Ollama", answer=OLLAMA_MODELS),
    ("GET", "/api/version"): Operation("Of Ollama's API", "Ollama", answer=obj({"version": STRING})),
    ("POST", "/open_session"): Operation("Begin a session", "SGLang", ref("OpenSession"), STRING),
    ("POST", "/close_session"): Operation("Forget a session", "SGLang", ref("CloseSession"), media_type="text/plain"),
    ("POST", "/pause_generation"): Operation(
        "Hold still; what runs ends, is computed anew or goes on later", "server", ref("PauseRequest"), ref("Done")
    ),
    ("POST", "/continue_generation"): Operation("End a pause", "server", ANY_OBJECT, ref("Done")),
    ("POST", "/update_weights_from_disk"): Operation(
        "Serve the weights of another checkpoint of the same shape", "server", ref("UpdateWeightsRequest"), ref("Done")
    ),
    ("POST", "/update_weight_version"): Operation(
        "Name the weights", "server", ref("UpdateVersionRequest"), ref("Done")
    ),
    ("POST", "/get_weights_by_name"): Operation(
        "The first rows of a weight", "server", ref("WeightRequest"), array({})
    ),
    ("POST", "/release_memory_occupation"): Operation(
        "Give device memory back; requests wait", "server", ref("MemoryRequest"), media_type="text/plain"
    ),
    ("POST", "/resume_memory_occupation"): Operation(
        "Take device memory again", "server", ref("MemoryRequest"), media_type="text/plain"
    ),
    ("POST", "/v1/embeddings"): EMBEDDINGS,
    ("POST", "/encode"): ENCODE,
    ("PUT", "/encode"): ENCODE,
    ("POST", "/classify"): CLASSIFY,
    ("PUT", "/classify"): CLASSIFY,
    ("POST", "/v1/classify"): CLASSIFY_WITH_LABELS,
    ("POST", "/v1/score"): SCORE,
    ("POST", "/score"): SCORE,
    ("POST", "/v1/rerank"): RERANK_FOR_SGLANG,
    ("POST", "/rerank"): RERANK,
    ("POST", "/v2/rerank"): RERANK,
    ("POST", "/v1/files"): UPLOAD,
    ("GET", "/v1/files"): Operation(
        "The files there are", "OpenAI", answer=page("File"), statuses=(400, 503), parameters=PAGE_PARAMETERS
    ),
    ("GET", "/v1/files/{file_id}"): Operation(
        "One file", "OpenAI", answer=ref("File"), statuses=(404, 503), parameters=path_parameter("file_id")
    ),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        "Delete a file", "OpenAI", answer=ANY_OBJECT, statuses=(400, 404, 503), parameters=path_parameter("file_id")
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        "What a file holds", "OpenAI", media_type="application/octet-stream", statuses=(404, 503),
        parameters=path_parameter("file_id"),
    ),
    ("POST", "/v1/batches"): CREATE_BATCH,
    ("GET", "/v1/batches"): Operation(
        "The batches there are", "OpenAI", answer=page("Batch"), statuses=(400, 503), parameters=PAGE_PARAMETERS
    ),
    ("GET", "/v1/batches/{batch_id}"): Operation(
        "One batch", "OpenAI", answer=ref("Batch"), statuses=(404, 503), parameters=path_parameter("batch_id")
    ),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(
        "End a batch now; the answers there are stay", "OpenAI", answer=ref("Batch"), statuses=(400, 404, 503),
        parameters=path_parameter("batch_id"),
    ),
    ("POST", "/tokenize"): TOKENIZE,
    ("POST", "/v1/tokenize"): TOKENIZE,
    ("GET", "/tokenizer_info"): Operation("Named special tokens and the chat template", "tokens", answer=ANY_OBJECT),
    ("POST", "/detokenize"): DETOKENIZE,
    ("POST", "/v1/detokenize"): DETOKENIZE,
    ("POST", "/parse_function_call"): PARSE_FUNCTION_CALL,
    ("POST", "/separate_reasoning"): SEPARATE_REASONING,
    ("GET", "/health"): HEALTH,
    ("GET", "/health_generate"): Operation(
        "As /health, and an idle engine is asked for one token", "server", answer=ref("Health"), statuses=(503,),
        error=HEALTH_ERROR,
    ),
    ("GET", "/get_model_info"): MODEL_INFO,
    ("GET", "/model_info"): MODEL_INFO,
    ("GET", "/get_server_info"): SERVER_INFO,
    ("GET", "/server_info"): SERVER_INFO,
    ("GET", "/get_load"): Operation("Requests and tokens in the engine", "server", answer=array(ANY_OBJECT)),
    ("POST", "/abort_request"): ABORT,
    ("GET", "/flush_cache"): FLUSH,
    ("POST", "/flush_cache"): FLUSH,
    ("GET", "/start_profile"): START_PROFILE,
    ("POST", "/start_profile"): START_PROFILE,
    ("GET", "/stop_profile"): STOP_PROFILE,
    ("POST", "/stop_profile"): STOP_PROFILE,
    ("GET", "/metrics"): Operation("Prometheus metrics", "server", media_type="text/plain"),
    ("GET", "/dashboard"): Operation("The live page", "server", media_type="text/html", is_open=True),
    ("GET", "/dashboard/data"): Operation("What the live page shows", "server", answer=ANY_OBJECT),
    ("GET", "/openapi.json"): Operation("This document", "server", answer=ANY_OBJECT),
}  # fmt: skip

ERROR_NAMES: dict[ErrorShape, str] = {
    native_error: "NativeError",
    openai_error: "OpenAIError",
    anthropic_error: "AnthropicError",
    ollama_error: "OllamaError",
}
STATUS_TEXTS = {
    400: "the request is wrong; the message says which field and why",
    401: "a key is missing or wrong",
    403: "a web page of another site may not do this",
    404: "there is no such thing",
    413: "the body is longer than --max-body-bytes, or a file than --max-file-bytes",
    429: "the queue is full; Retry-After says when to come back",
    503: "not now: starting, stuck or stopping",
}


class OpenApi:
    def routes(self) -> list[web.RouteDef]:
        return [web.get("/openapi.json", self.document)]

    async def document(self, http_request: web.Request) -> web.Response:
        return json_response(document_of(http_request.app))


def routes_of(app: web.Application) -> list[tuple[str, str]]:
    """(method, path) of each route, without the HEAD that comes with every GET."""
    return [
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    ]


def document_of(app: web.Application) -> JSON:
    paths: dict[str, JSON] = {}
    for method, path in routes_of(app):
        paths.setdefault(path, {})[method.lower()] = _described(method, path, OPERATIONS[method, path])
    try:
        number = version("radixloop")
    except PackageNotFoundError:  # run from a checkout
        number = "0"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "radixloop",
            "version": number,
            "description": "The APIs of SGLang, OpenAI, Anthropic and Ollama, of one model.",
        },
        "paths": paths,
        "components": {
            "schemas": COMPONENTS,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def _described(method: str, path: str, operation: Operation) -> JSON:
    content: JSON = {operation.media_type: {"schema": operation.answer or STRING}}
    if operation.is_streaming:
        content[operation.stream_type] = {"schema": {"type": "string", "description": "with `stream`"}}
    error_schema = operation.error or ref(ERROR_NAMES[error_shape(path)])
    error = {"application/json": {"schema": error_schema}}
    statuses = {*operation.statuses}
    if not operation.is_open:
        statuses.add(401)
    if operation.body is not None:
        statuses |= {400, 413}
    described: JSON = {
        "operationId": f"{method.lower()}{path.translate(str.maketrans('/.{}', '____'))}",
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{str(status): {"description": STATUS_TEXTS[status], "content": error} for status in sorted(statuses)},
        },
    }
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
    if operation.form is not None:
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": operation.form}}}
    if operation.is_open:
        described["security"] = [{}]
    return described

"""JSON schemas of what the routes take and answer, for `server.watch.openapi`."""

from collections.abc import Iterable
from typing import Any

import msgspec

from engine.declared import MAX_INT, Object
from engine.request import MIN_PENALTY, TOP_K_ALL
from server.reading.protocol import JSON, MAX_N, REQUEST_FIELDS

SCHEMAS = "#/components/schemas/"


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


def schemas_of(kinds: Iterable[type[Object]]) -> dict[str, JSON]:
    """Return the schemas, by name, of bodies and of what is in them, as their classes declare them."""
    _, found = msgspec.json.schema_components(kinds, schema_hook=lambda _: UNSUPPORTED, ref_template=SCHEMAS + "{name}")
    for schema in found.values():
        fields = schema.get("properties", {})
        schema["properties"] = {
            name: _shown(field) for name, field in fields.items() if UNSUPPORTED not in field.get("anyOf", ())
        }
    return found


UNSUPPORTED: JSON = {"not": {}}


def _shown(field: JSON) -> JSON:
    """Return a field's schema without null, which means that it is absent."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    shown = {name: value for name, value in field.items() if name != "anyOf" and (name, value) != ("default", None)}
    return shown | ({} if not kinds else kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def path_parameter(name: str) -> tuple[JSON, ...]:
    return ({"name": name, "in": "path", "required": True, "schema": STRING},)


TOKEN_IDS = array(integer(0), minItems=1)
LOGPROBS = array({"type": "array"})

SAMPLING: dict[str, JSON] = {
    "temperature": number(0, 100),
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": integer(-1, TOP_K_ALL),
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(MIN_PENALTY, 2),
    "logit_bias": {
        "type": "object",
        "additionalProperties": number(-100, 100),
        "propertyNames": {"type": "string", "pattern": "^[0-9]{1,6}$"},
        "description": "token id to what is added to its logit",
    },
    "stop": or_list(STRING),
    "stop_token_ids": array(integer()),
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
EVERYWHERE: dict[str, JSON] = {
    "stream": BOOLEAN,
    "rid": {"type": "string", "description": "name of the request, for /abort_request"},
    "priority": {**integer(), "description": "larger runs first"},
    "extra_key": {"type": "string", "description": "cached prefixes are shared within one key only"},
    "cache_salt": {"type": "string", "description": "as extra_key"},
}
GRAMMAR_FORMAT: dict[str, JSON] = {"definition": STRING, "syntax": {"enum": ["lark", "regex"]}}
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
    obj(
        {
            "type": {"const": "item_reference"},
            "id": {"type": "string", "description": "of an item of a stored response"},
        },
        ["type", "id"],
    ),
)
RESPONSES_REQUEST = obj(
    {
        **SHARED_FIELDS,
        **{name: SAMPLING[name] for name in ("temperature", "top_p")},
        "input": one_of(STRING, array(RESPONSES_ITEM)),
        "instructions": STRING,
        "max_output_tokens": integer(1),
        "previous_response_id": STRING,
        "store": {
            "type": "boolean",
            "description": "keep the answer in memory, as long as there is room; default: true",
        },
        "background": {"type": "boolean", "description": "answer at once, with an id to ask for later"},
        "tools": array(
            one_of(
                obj({"type": {"const": "function"}, "name": STRING, "parameters": ANY_OBJECT}, ["type", "name"]),
                obj(
                    {
                        "type": {"const": "custom"},
                        "name": STRING,
                        "format": one_of(
                            obj({"type": {"const": "text"}}, ["type"]),
                            obj({"type": {"const": "grammar"}, **GRAMMAR_FORMAT}, ["type", "definition", "syntax"]),
                        ),
                    },
                    ["type", "name"],
                ),
                obj({"type": {"enum": ["local_shell", "shell", "apply_patch"]}}, ["type"]),
            )
        ),
        "tool_choice": one_of(
            {"enum": ["auto", "none", "required"]},
            obj({"type": {"enum": ["function", "custom"]}, "name": STRING}, ["type", "name"]),
            obj({"type": {"enum": ["local_shell", "shell", "apply_patch"]}}, ["type"]),
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
        "truncation": {"enum": ["disabled", "auto"], "description": "nothing is cut, whichever it says"},
        "metadata": {"type": "object", "additionalProperties": STRING},
        "user": STRING,
    },
    ["input"],
)

COMPONENTS: dict[str, JSON] = {
    "MetaInfo": META_INFO,
    "GenerateAnswer": obj(
        {"text": STRING, "output_ids": array(integer(0)), "meta_info": ref("MetaInfo"), "index": integer(0)},
        ["text", "output_ids", "meta_info"],
    ),
    "Usage": USAGE,
    "OpenAIAnswer": OPENAI_ANSWER,
    "ModelCard": MODEL_CARD,
    "Health": obj(
        {
            "status": {"enum": ["ok", "starting", "stuck", "stopping", "stopped"]},
            "last_step_age_s": {"type": "number"},
            "oldest_queued_s": {"type": "number"},
            "num_running": integer(0),
            "num_queued": integer(0),
            "num_violations": integer(0),
            "num_canary_alarms": integer(0),
            "canary_drift": {"type": "number"},
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
    "Embeddings": obj(
        {
            "object": {"const": "list"},
            "data": array(obj({"index": integer(0)}, ["object", "index", "embedding"])),
            "model": STRING,
            "usage": ref("Usage"),
        },
        ["object", "data", "model", "usage"],
    ),
    "Encoded": obj({"embedding": array({"type": "number"}), "meta_info": ref("MetaInfo")}, ["embedding", "meta_info"]),
    "Done": obj({"message": STRING}, ["message"]),
    "NativeError": obj(
        {"error": obj({"message": STRING, "code": integer(400, 599), "field": STRING}, ["message", "code"])}, ["error"]
    ),
    "OpenAIError": obj(
        {"error": obj({"message": STRING, "type": STRING, "param": {}, "code": {}}, ["message", "type"])}, ["error"]
    ),
}
COMPONENTS |= {
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

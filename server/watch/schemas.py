"""JSON schemas of what the routes take and answer, for `server.watch.openapi`."""

from collections.abc import Iterable
from typing import Any

import msgspec

from engine.declared import MAX_INT, Object
from server.reading.protocol import JSON
from server.watch.meanings import ANSWERS, meaning_of

SCHEMAS = "#/components/schemas/"


def ref(name: str) -> JSON:
    return {"$ref": SCHEMAS + name}


def obj(properties: dict[str, JSON], required: Iterable[str] = (), **more: Any) -> JSON:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def array(items: JSON, **more: Any) -> JSON:
    return {"type": "array", "items": items, **more}


def integer(low: int = -MAX_INT, high: int = MAX_INT) -> JSON:
    return {"type": "integer", "minimum": low, "maximum": high}


def one_of(*schemas: JSON) -> JSON:
    return {"anyOf": list(schemas)}


def or_list(schema: JSON) -> JSON:
    return one_of(schema, array(schema))


STRING, BOOLEAN, ANY_OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}


def schemas_of(kinds: Iterable[type[Object]]) -> dict[str, JSON]:
    """Return the schemas, by name, of bodies and of what is in them, as their classes declare them."""
    _, found = msgspec.json.schema_components(kinds, schema_hook=lambda _: UNSUPPORTED, ref_template=SCHEMAS + "{name}")
    for kind, schema in found.items():
        fields = schema.get("properties", {})
        schema["properties"] = {
            name: _explained(kind, name, _shown(field))
            for name, field in fields.items()
            if UNSUPPORTED not in field.get("anyOf", ())
        }
    return found


UNSUPPORTED: JSON = {"not": {}}


def _shown(field: JSON) -> JSON:
    """Return a field's schema without null, which means that it is absent."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    shown = {name: value for name, value in field.items() if name != "anyOf" and (name, value) != ("default", None)}
    return shown | ({} if not kinds else kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _explained(kind: str, name: str, field: JSON) -> JSON:
    """Return a field's schema with its meaning, if the declaration has none."""
    meaning = meaning_of(kind, name)
    return field if "description" in field or meaning is None else {**field, "description": meaning}


def with_meanings(answer: JSON) -> JSON:
    """Return an answer's schema whose fields, at any depth, have their meanings."""
    shown = dict(answer)
    if "properties" in shown:
        shown["properties"] = {
            name: {"description": ANSWERS[name], **with_meanings(field)} if name in ANSWERS else with_meanings(field)
            for name, field in shown["properties"].items()
        }
    if "items" in shown:
        shown["items"] = with_meanings(shown["items"])
    if "anyOf" in shown:
        shown["anyOf"] = [with_meanings(one) for one in shown["anyOf"]]
    return shown


def path_parameter(name: str) -> tuple[JSON, ...]:
    return ({"name": name, "in": "path", "required": True, "schema": STRING},)


TOKEN_IDS = array(integer(0), minItems=1)
LOGPROBS = array({"type": "array"})

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
        "choices": array(ref("Choice")),
        "usage": ref("Usage"),
    },
    ["id", "object", "created", "model", "choices", "usage"],
)
MODEL_CARD = obj({"id": STRING, "object": {"const": "model"}, "max_model_len": integer(1)}, ["id", "object"])

CHOICE = obj(
    {
        "index": integer(0),
        "message": obj(
            {
                "role": STRING,
                "content": one_of(STRING, {"type": "null"}),
                "reasoning_content": one_of(STRING, {"type": "null"}),
                "tool_calls": array(ANY_OBJECT),
            },
            description="of a chat",
        ),
        "text": {**STRING, "description": "of a completion"},
        "finish_reason": one_of(STRING, {"type": "null"}),
        "matched_stop": {},
        "logprobs": {},
        "meta_info": ref("MetaInfo"),
    },
    ["index"],
)

COMPONENTS: dict[str, JSON] = {
    "Choice": CHOICE,
    "MetaInfo": META_INFO,
    "GenerateAnswer": obj(
        {"text": STRING, "output_ids": array(integer(0)), "meta_info": ref("MetaInfo"), "index": integer(0)},
        ["output_ids", "meta_info"],  # text, too, where there is a tokenizer
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
COMPONENTS = {name: with_meanings(schema) for name, schema in COMPONENTS.items()}

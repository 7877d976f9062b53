"""Errors in the shape of each API, and in the words by which its clients know them."""

import math
from collections.abc import Callable

from aiohttp import web

from engine.errors import EngineError, PromptTooLong, QueueFull
from server.reading.protocol import JSON, json_response

# (status, message, field, code) to the body of an error answer.
ErrorShape = Callable[[int, str, str | None, str | None], JSON]


def native_error(status: int, message: str, field: str | None = None, _code: str | None = None) -> JSON:
    """Return an error in SGLang's shape, with the field where one is to blame."""
    return {"error": {"message": message, "code": status, **({"field": field} if field else {})}}


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

INTERNAL_ERROR = "internal server error; the server's log says more"


def openai_error(status: int, message: str, field: str | None = None, code: str | None = None) -> JSON:
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(status: int, message: str, _field: str | None = None, _code: str | None = None) -> JSON:
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_error(_status: int, message: str, _field: str | None = None, _code: str | None = None) -> JSON:
    return {"error": message}


ERROR_SHAPES: dict[str, ErrorShape] = {
    "/v1/messages": anthropic_error,
    "/v1/": openai_error,
    "/invocations": openai_error,
    "/api/": ollama_error,
}


def error_shape(path: str) -> ErrorShape:
    """Return the shape of errors that clients of the API at `path` expect."""
    return next((shape for prefix, shape in ERROR_SHAPES.items() if path.startswith(prefix)), native_error)


def error_response(path: str, error: EngineError) -> web.Response:
    """Return the response that reports `error` to a client of the API at `path`."""
    headers: dict[str, str] = {}
    message, field, code = str(error), getattr(error, "field", None), getattr(error, "code", None)
    if isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
        message, field = _too_long(path, error)
    elif isinstance(error, QueueFull):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return json_response(error_shape(path)(error.status_code, message, field, code), error.status_code, headers)


# The field that holds the prompt. Under other paths the error's own field stands.
_PROMPT_FIELDS = {
    "/v1/messages": "messages",
    "/v1/chat/completions": "messages",
    "/invocations": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}


def _too_long(path: str, error: PromptTooLong) -> tuple[str, str | None]:
    """Return message and field of a prompt that does not fit, in the words by which an API's clients know the case.

    They then shorten the conversation, and repeat what they cannot read.
    """
    shape, field = error_shape(path), error.field or ""
    name = _PROMPT_FIELDS.get(path, "")
    field = field if field.startswith(name) else name  # it may name one of several
    prompt_len, answer_len, limit = error.prompt_len, error.answer_len, error.limit
    if not limit or shape not in (anthropic_error, openai_error):
        return str(error), field
    if shape is anthropic_error:
        if not answer_len:
            return f"prompt is too long: {prompt_len} tokens > {limit} maximum", field
        return f"input length and `max_tokens` exceed context limit: {prompt_len} + {answer_len} > {limit}", field
    asked = (
        f"you requested {prompt_len + answer_len} tokens ({prompt_len} in {field}, {answer_len} for the answer)"
        if answer_len
        else f"{field} has {prompt_len} tokens{', and at least one is left for the answer' * (prompt_len <= limit)}"
    )
    return f"This model's maximum context length is {limit} tokens, but {asked}.", field

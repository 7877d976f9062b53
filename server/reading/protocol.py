"""Common ground of the APIs: the reading of JSON bodies, and errors in each API's shape."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import msgspec
import orjson
from aiohttp import web

from engine.declared import Object, convert, decode
from engine.engine import Engine
from engine.errors import EngineError, InvalidRequest, PromptTooLong, QueueFull, shown
from server.http.bodies import BODY, BODY_BUDGET, BodyTooLarge, HeldBody, next_of_body
from server.http.intake import GATE, LONG_WORK, Pace, paced
from server.reading.mending import mended

JSON = dict[str, Any]
Body = TypeVar("Body", bound=Object)
# The maker of requests, as a mapping of facts about them: an HTTP request, or a line of a batch.
Owner = MutableMapping[Any, Any]
MAX_REQUESTS = 1 << 14  # of one HTTP request: prompts times n
LEAST_MAX_REQUESTS = 1 << 11  # OpenAI's limit for a list of texts
ROUNDS = 16  # of a full engine, that one HTTP request may take: lists are no longer
MAX_N = 128
LONG_BODY = 1 << 18  # bytes
MAX_DEPTH = 200  # of a body's objects and lists
WRITABLE_DEPTH = 254  # orjson's, which reads 1,024: the difference is for what an answer puts around what it repeats
UNTYPED = "/api/"  # Ollama's paths, whose bodies are JSON whatever their type: curl names none in its examples
PLACE = re.compile(r"\[\d+\]")  # in a list
PART = re.compile(r"[.\[]")  # where a part of a field's name begins
REQUEST_FIELDS = ("priority", "extra_key", "cache_salt")  # SGLang's, which every API takes


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def check_token_ids(ids: Any, vocab_size: int, field: str, *, may_be_empty: bool = False) -> list[int]:
    """Return `ids` if it is a list of ids of the vocabulary, not empty unless it may be."""
    if may_be_empty and ids == []:
        return []
    if not isinstance(ids, list) or not ids:
        raise InvalidRequest(f"{field} must be a non-empty list of token ids, got {shown(ids)}", field)
    if set(map(type, ids)) != {int}:
        wrong = next(token_id for token_id in ids if type(token_id) is not int)
        raise InvalidRequest(f"{field} must hold integers only, got {shown(wrong)}", field)
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{field} holds {token_id}, the vocabulary has ids 0 to {vocab_size - 1}", field)
    return ids


def check_prompt_ids(engine: Engine, ids: Any, field: str) -> list[int]:
    """Return `ids` if it is a prompt's list of token ids. `PromptTooLong`, without a look at each, if none has so many.

    Millions of ids take as long to check as a step.
    """
    if isinstance(ids, list) and len(ids) > engine.context_length:
        raise PromptTooLong(
            f"prompt has {len(ids)} tokens, the context is {engine.context_length} "
            f"and at least one is left for the answer",
            field,
            prompt_len=len(ids),
            limit=engine.context_length,
        )
    return check_token_ids(ids, engine.model_config.vocab_size, field)


async def encode_prompt(engine: Engine, text: Any, field: str, add_special_tokens: bool = True) -> list[int]:
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a string", field)
    ids = await engine.encode(text, add_special_tokens) if text else []
    if not ids:
        raise InvalidRequest(f"{field} is an empty prompt: it needs at least one token", field)
    return ids


async def read_prompts(
    engine: Engine, given: str | list[Any] | None, name: str, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the token ids of each prompt of a field: a string, token ids, or a list of either."""
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, list) and given and is_int(given[0]):
        return [check_prompt_ids(engine, given, name)]
    if not isinstance(given, list) or not given:
        raise InvalidRequest(
            f"{name} must be a string, a list of token ids, or a non-empty list of these, got {shown(given)}", name
        )
    check_batch_size(engine, len(given), name)
    prompts = []
    async for i, one in paced(enumerate(given)):
        field = name if len(given) == 1 else f"{name}[{i}]"
        if isinstance(one, list):
            prompts.append(check_prompt_ids(engine, one, field))
        else:
            prompts.append(await encode_prompt(engine, one, field, add_special_tokens))
    return prompts


def max_requests(engine: Engine) -> int:
    """Return how many requests may be made of one HTTP request: what the engine answers in a time to wait for."""
    return min(MAX_REQUESTS, max(LEAST_MAX_REQUESTS, ROUNDS * engine.max_running_requests))


def check_batch_size(engine: Engine, count: int, field: str) -> None:
    limit = max_requests(engine)
    if count > limit:
        raise InvalidRequest(f"{field} has {count} prompts, the limit is {limit}", field)


def check_n(engine: Engine, n: int, num_prompts: int) -> None:
    limit = min(MAX_N, max_requests(engine) // num_prompts)
    if n > limit:
        raise InvalidRequest(f"n must be between 1 and {limit}, got {n}", "n")


@contextmanager
def spelled(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors from inside name a field as the client spelled it.

    names: OpenAI's name to the client's; "[]" in one stands for a place in a list, "[3]".
    """
    try:
        yield
    except InvalidRequest as error:
        ours = error.field or ""
        if theirs := _theirs(ours, names):
            error.args, error.field = (str(error).replace(ours, theirs, 1),), theirs
        raise


def _theirs(ours: str, names: Mapping[str, str]) -> str:
    """Return the client's name of a field, by the longest part of it that has one; empty: it is ours."""
    for end in (len(ours), *(part.start() for part in reversed(list(PART.finditer(ours))))):
        head, place = ours[:end], PLACE.search(ours[:end])
        theirs = names.get(head)
        if theirs is None and place:
            theirs = names.get(head.replace(place[0], "[]", 1), "").replace("[]", place[0], 1)
        if theirs:
            return theirs + ours[end:]
    return ""


async def read_body(request: web.Request, kind: type[Body]) -> Body:
    """Read the request's body. 400 when it is not a `kind`, 413 when it is longer than the server allows.

    What is returned loses its large fields once the engine has the requests made of it (`LiveRequests.submitted`).
    """
    pieces, held = await _receive(request)
    num_bytes = sum(map(len, pieces))
    if num_bytes > LONG_BODY:
        work = request.app[LONG_WORK]
        async with work.alone():
            pieces = [b"".join(pieces)]
        async with work.alone():
            body = parse(pieces.pop(), kind, num_containers=held.num_containers)
    else:
        await request.app[GATE].wait(num_bytes)
        body = parse(b"".join(pieces), kind, num_containers=held.num_containers)
    held.hold(body)
    return body


async def read_optional_body(request: web.Request, kind: type[Body]) -> Body:
    """Read a body that may be left out."""
    return await read_body(request, kind) if request.body_exists else convert({}, kind)


async def _receive(request: web.Request) -> tuple[list[bytes], HeldBody]:
    """Return the body's JSON in pieces, and the memory that it takes.

    aiohttp's own `read` would keep it as long as the request.
    """
    limit = request.client_max_size
    if (request.content_length or 0) > limit:
        raise body_too_long(limit)
    kind = request.content_type
    is_json = kind.endswith(("/json", "+json")) or request.path.startswith(UNTYPED)
    if "Content-Type" in request.headers and not is_json:
        # A web page may send text/plain or a form to a local server without asking; never JSON.
        raise InvalidRequest(f"Content-Type must be application/json, got {kind}", "Content-Type")
    held = request[BODY] = HeldBody(request.app[BODY_BUDGET])
    pieces, num_bytes, pace = [], 0, Pace()
    while piece := await next_of_body(request.content.readany()):
        num_bytes += len(piece)
        if num_bytes > limit:
            raise body_too_long(limit)
        held.add(piece)
        pieces.append(piece)
        await pace.keep()
    return pieces, held


def body_too_long(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is longer than {limit} bytes, the limit set by --max-body-bytes")


def parse(text: bytes, kind: type[Body], name: str = "the body", num_containers: int | None = None) -> Body:
    """Parse a client's JSON. `InvalidRequest` if it is no `kind`, or so deep that it could not be written or shown.

    num_containers: of its objects and lists, at most, where that is known.
    """
    if num_containers is None:
        num_containers = text.count(b"{") + text.count(b"[")
    try:
        body = decode(text, kind)
        if num_containers > MAX_DEPTH:
            _check_depth([getattr(body, name) for name in body.__struct_fields__])
    except msgspec.DecodeError as error:
        if (better := mended(text)) is not None:
            return parse(better, kind, name, num_containers)
        raise InvalidRequest(f"{name} is not valid JSON: {_syntax_error(text) or error}") from None
    except RecursionError:
        raise InvalidRequest(f"{name} has more than {MAX_DEPTH} objects or lists inside each other") from None
    return body


def _syntax_error(text: bytes) -> str | None:
    """Return what is wrong, with line and column, of a JSON that is not long."""
    if len(text) >= LONG_BODY:
        return None
    try:
        text.decode()
        orjson.loads(text)
    except UnicodeDecodeError as error:
        return f"it is not UTF-8, byte {error.start} is 0x{text[error.start]:02x}"
    except orjson.JSONDecodeError as error:
        return str(error)
    return None


def _check_depth(values: list[Any]) -> None:
    """Raise `RecursionError` if what was read is deeper than may be. What was passed over does not count."""
    wrapped = values
    for _ in range(WRITABLE_DEPTH - MAX_DEPTH):
        wrapped = [wrapped]
    try:
        orjson.dumps(wrapped, default=msgspec.structs.asdict)
    except TypeError as error:
        if not str(error).startswith("Integer"):
            raise RecursionError from None
        _check_depth(orjson.loads(msgspec.json.encode(values)))  # integers beyond 64 bits become floats


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, headers=headers, content_type="application/json")


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
    shape, field = error_shape(path), _PROMPT_FIELDS.get(path, error.field)
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
        else f"{field} has {prompt_len} tokens, and at least one is left for the answer"
    )
    return f"This model's maximum context length is {limit} tokens, but {asked}.", field

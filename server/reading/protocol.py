"""Common ground of the APIs: JSON that is read, and JSON that is written."""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import msgspec
import orjson
from aiohttp import web

from engine.declared import Object, convert, decode
from engine.errors import InvalidRequest
from server.http.bodies import BODY, BODY_BUDGET, BodyTooLarge, HeldBody, next_of_body
from server.http.intake import GATE, LONG_WORK, Pace
from server.reading.mending import mended

JSON = dict[str, Any]
Body = TypeVar("Body", bound=Object)
# The maker of requests, as a mapping of facts about them: an HTTP request, or a line of a batch.
Owner = MutableMapping[Any, Any]
LONG_BODY = 1 << 18  # bytes
MAX_DEPTH = 200  # of a body's objects and lists
WRITABLE_DEPTH = 254  # orjson's, which reads 1,024: the difference is for what an answer puts around what it repeats
UNTYPED = "/api/"  # Ollama's paths, whose bodies are JSON whatever their type: curl names none in its examples
PLACE = re.compile(r"\[\d+\]")  # in a list
PART = re.compile(r"[.\[]")  # where a part of a field's name begins
REQUEST_FIELDS = ("priority", "extra_key", "cache_salt")  # SGLang's, which every API takes


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


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

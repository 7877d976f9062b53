"""Every route of the served OpenAPI document, asked what the document allows and what it does not.

Whatever is sent, the answer is one that the document announces: never a 5xx, never none at all. Bodies are drawn from
the schemas, and then, in part, spoilt. Forms, lines of batches, sessions, and the router in front get the same.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import pytest
from aiohttp.test_utils import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.declared import MAX_INT, Object, Unsupported
from server.watch.openapi import OPERATIONS, routes_of
from tests.client import events_of
from tests.fake_engine import SeeingEngine, serving
from tests.test_router import routing, url_of

PATIENCE_S = 60.0
EXAMPLES = 60  # an operation with a body


def examples(count: int) -> settings:
    """Draw so many examples, the same in every run: it proves as much as the one before."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip


Schema = dict[str, Any]


class Loop:
    """An event loop with a server and a client on it, for tests that are not coroutines."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner, self.stack = runner, AsyncExitStack()
        self.engine = SeeingEngine(context_length=2048)

    async def start(self) -> None:
        self.client: TestClient[Any, Any] = await self.stack.enter_async_context(
            serving(self.engine, enable_metrics=True)
        )
        response = await self.client.get("/openapi.json")
        self.document: Schema = await response.json()
        self.router: TestClient[Any, Any] = await self.stack.enter_async_context(
            routing(url_of(self.client), policy="cache_aware")
        )

    async def send(self, method: str, path: str, body: bytes | None, kind: str, *, by_router: bool = False) -> "Reply":
        headers = {"Content-Type": kind} if body is not None else {}
        client = self.router if by_router else self.client
        async with asyncio.timeout(PATIENCE_S):
            response = await client.request(method, path, data=body, headers=headers)
            return Reply(response.status, response.content_type, await response.read())

    async def json(self, method: str, path: str, value: Any = None) -> Any:
        """Return the answer's JSON, of a request that is right."""
        reply = await self.send(method, path, None if value is None else encoded(value), "application/json")
        assert reply.status == 200, reply
        return json.loads(reply.body)


@dataclass(frozen=True)
class Reply:
    status: int
    kind: str
    body: bytes


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with asyncio.Runner() as runner:
        loop = Loop(runner)
        runner.run(loop.start())
        yield loop
        runner.run(loop.stack.aclose())


# ---- values from schemas ----

TEXT = st.text(max_size=12) | st.sampled_from(["", "\0", "a" * 300, "<|im_end|>", "日本🙂", "\ud7ff", "{{ 1 }}"])


def deep() -> Any:
    """Return a list inside a list, and so on, deeper than can be written."""
    value: Any = 0
    for _ in range(300):
        value = [value]
    return value


def declared_kinds(kind: type[Object]) -> set[type[Object]]:
    """Return a class of bodies and all that are declared beneath it."""
    return {kind, *(found for child in kind.__subclasses__() for found in declared_kinds(child))}


JSON_VALUES = (
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=6,
    )
    | st.builds(deep)
    | st.sampled_from([1 << 64, -(1 << 200), 1e300])
)
# Names that no schema has: what the bodies' classes refuse, however deep inside.
UNDOCUMENTED = sorted(
    {
        field.encode_name
        for kind in declared_kinds(Object)
        for field in msgspec.structs.fields(kind)
        if Unsupported in get_args(field.type)
    }
)


def values_of(schema: Schema, document: Schema) -> st.SearchStrategy[Any]:
    """Values that `schema` allows, small ones."""
    if "$ref" in schema:
        return values_of(resolve(schema, document), document)
    if "anyOf" in schema:
        return st.one_of([values_of(choice, document) for choice in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        properties = {name: values_of(value, document) for name, value in schema.get("properties", {}).items()}
        required = {name: properties.pop(name) for name in schema.get("required", ())}
        drawn = st.fixed_dictionaries(required, optional=properties)
        if not properties and not required:
            keys = st.from_regex(schema.get("propertyNames", {}).get("pattern", "^[a-z]{1,5}$"), fullmatch=True)
            extra = schema.get("additionalProperties")
            return st.dictionaries(keys, values_of(extra, document) if extra else JSON_VALUES, max_size=3)
        return drawn
    if kind == "array":
        items = values_of(schema["items"], document) if "items" in schema else JSON_VALUES
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=schema.get("minItems", 0) + 3)
    if kind == "integer":
        low, high = schema.get("minimum", -MAX_INT), schema.get("maximum", MAX_INT)
        near = [value for value in (0, 1, 2, 5, 97, low, high) if low <= value <= high]
        return st.sampled_from(near) | st.integers(max(low, -300), min(high, 300))
    if kind == "number":
        return st.floats(schema.get("minimum", -1000), schema.get("maximum", 1000))
    return {"string": TEXT, "boolean": st.booleans(), "null": st.none()}[kind or "null"]


def resolve(schema: Schema, document: Schema) -> Schema:
    while "$ref" in schema:
        node: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            node = node[part]
        schema = node
    return schema


@st.composite
def spoilt(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Any:
    """Return a value with one thing in it replaced, removed or added."""
    value = draw(values)
    node = value
    path: list[tuple[Any, Any]] = []
    while isinstance(node, (dict, list)) and node and (not path or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        path.append((node, key))
        node = node[key]
    if not path:
        return draw(JSON_VALUES)
    owner, key = path[-1]
    match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
        case "replace":
            owner[key] = draw(JSON_VALUES)
        case "remove":
            del owner[key]
        case "add":
            if isinstance(owner, dict):
                owner[draw(TEXT | st.sampled_from(UNDOCUMENTED))] = draw(JSON_VALUES)
            else:
                owner.append(draw(JSON_VALUES))
    return value


def bodies_of(schema: Schema, document: Schema) -> st.SearchStrategy[tuple[bytes, str]]:
    """(body, content type)."""
    values = values_of(schema, document)
    good, bad = values.map(encoded), spoilt(values).map(encoded)
    kinds = st.just("application/json")
    junk = st.tuples(st.binary(max_size=40) | good | good.map(lambda body: body[:-3]), kinds | st.just("text/plain"))
    return st.one_of(st.tuples(good, kinds), st.tuples(bad, kinds), st.tuples(bad, kinds), junk)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---- answers against schemas ----

TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


def misfit(value: Any, schema: Schema, document: Schema, at: str = "answer") -> str | None:
    """Return what in `value` the schema does not allow; None if nothing."""
    schema = resolve(schema, document)
    if "anyOf" in schema:
        misfits = [misfit(value, choice, document, at) for choice in schema["anyOf"]]
        return None if None in misfits else misfits[0]
    if "const" in schema and value != schema["const"]:
        return f"{at} is {value!r}"
    if "enum" in schema:
        return None if value in schema["enum"] else f"{at} is {value!r}"
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return f"{at} is {value!r}, not of type {kind}"
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"{at} has no {missing[0]}"
        for name, inner in schema.get("properties", {}).items():
            if name in value and (found_inside := misfit(value[name], inner, document, f"{at}.{name}")):
                return found_inside
    if isinstance(value, list) and "items" in schema:
        return next((found for one in value if (found := misfit(one, schema["items"], document, at))), None)
    return None


def check(reply: Reply, operation: Schema, document: Schema) -> None:
    """Assert that the reply is one that the document announces."""
    said = f"{reply.status} {reply.kind} {reply.body[:200]!r}"
    assert reply.status < 500, said
    responses = operation["responses"]
    assert str(reply.status) in responses, said
    content = responses[str(reply.status)]["content"]
    if not reply.body and reply.kind == "application/octet-stream":
        return
    assert reply.kind in content, said
    if reply.kind == "text/event-stream":
        if reply.body.startswith(b"event: "):
            events = [event.split("\ndata: ")[1] for event in reply.body.decode().removesuffix("\n\n").split("\n\n")]
        else:
            *events, done = events_of(reply.body)
            assert done == "[DONE]"
        for event in events:
            json.loads(event)
    elif reply.kind == "application/x-ndjson":
        last = [json.loads(line) for line in reply.body.splitlines()][-1]
        assert last.get("done") or last["status"] == "success"
    elif reply.kind == "application/json":
        assert misfit(json.loads(reply.body), content[reply.kind]["schema"], document) is None, said


WITH_BODY = [key for key, operation in OPERATIONS.items() if operation.body is not None]
WITHOUT_BODY = [key for key, operation in OPERATIONS.items() if operation.body is None]


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
def test_no_body_brings_a_route_down(loop: Loop, method: str, path: str) -> None:
    operation = loop.document["paths"][path][method.lower()]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]

    @examples(EXAMPLES)
    @given(bodies_of(schema, loop.document))
    def ask(body: tuple[bytes, str]) -> None:
        check(loop.runner.run(loop.send(method, path, *body)), operation, loop.document)

    ask()
    if path == "/v1/responses":  # those in the background end in their own time
        loop.runner.run(loop.engine.until(lambda: not loop.engine.live))
    left, loop.engine.live = loop.engine.live, {}
    assert not left, "a request outlived its answer"


def test_no_name_that_the_document_lacks_brings_a_route_down(loop: Loop) -> None:
    """Those are fields that the bodies' classes refuse unless they are empty."""
    empties: list[Any] = [None, False, 0, "", [], {}, ["x"]]
    for method, path in WITH_BODY:
        operation = loop.document["paths"][path][method.lower()]
        for value in empties:
            body = encoded(dict.fromkeys(UNDOCUMENTED, value))
            check(loop.runner.run(loop.send(method, path, body, "application/json")), operation, loop.document)


@pytest.mark.parametrize(("method", "path"), WITHOUT_BODY)
def test_no_query_brings_a_route_down(loop: Loop, method: str, path: str) -> None:
    operation = loop.document["paths"][path][method.lower()]
    for query in ("", "?", "?a=%00&b=%ff", "?" + "x" * 2000):
        for name in ("demo", "%2e%2e%2f", "a/b", "%00", "x" * 500):
            reply = loop.runner.run(loop.send(method, re.sub(r"{\w+}", name, path) + query, None, ""))
            check(reply, operation, loop.document)
            if "{" not in path:
                break


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONSENSE"])
def test_no_method_and_no_path_brings_the_server_down(loop: Loop, method: str) -> None:
    paths = [re.sub(r"{\w+}", "x", path) for _, path in OPERATIONS] + ["/", "//", "/nope", "/generate/", "/%00", "/v1"]
    for path in paths:
        reply = loop.runner.run(loop.send(method, path, b"", "application/json"))
        assert reply.status < 500, (method, path, reply)
        assert reply.status != 404 or json.loads(reply.body)["error"]["message"]


# ---- forms ----

FORMS = [key for key, operation in OPERATIONS.items() if operation.form is not None]
FILE, PURPOSE = (b'Content-Disposition: form-data; name="%s"' % name for name in (b"file", b"purpose"))
PART_HEADERS = [
    FILE, FILE + b'; filename="a.jsonl"', FILE + b'; filename="\xff/../\x01"', PURPOSE, FILE.replace(b'"', b""),
    b"Content-Disposition: form-data", b"Content-Disposition: ;=;", b"Content-Type: multipart/mixed; boundary=b",
    b"Content-Type: application/x-www-form-urlencoded", b"Content-Transfer-Encoding: base64",
    b"Content-Transfer-Encoding: quoted-printable", b"Content-Encoding: gzip", b"Content-Encoding: x",
    b"Content-Length: 3", b"Content-Length: -1", b"no header", b"X: " + b"y" * 9000,
]  # fmt: skip
CONTENTS = st.sampled_from([b"batch", b"{}", b"", b"\xff", b"--b--", b"a\r\n--b\r\n", b"=3D=", b"x" * 70_000])
PARTS = st.lists(st.tuples(st.lists(st.sampled_from(PART_HEADERS), max_size=3, unique=True), CONTENTS), max_size=4)
FORM_KINDS = ["multipart/form-data; boundary=b"] * 5 + [
    'multipart/form-data; boundary="b"; charset=x', "multipart/form-data", "multipart/form-data; boundary=",
    "multipart/form-data; boundary=" + "b" * 200, "multipart/mixed; boundary=b", "application/json",
]  # fmt: skip


@st.composite
def forms(draw: st.DrawFn) -> tuple[bytes, str]:
    """Return (a form's body, perhaps with bytes taken out or put in; its content type)."""
    parts = draw(PARTS)
    if draw(st.booleans()):  # a file that could be one, at the beginning
        parts.insert(0, (PART_HEADERS[:1], b"{}"))
    form = (
        b"".join(b"--b\r\n" + b"\r\n".join([*head, b"", content]) + b"\r\n" for head, content in parts) + b"--b--\r\n"
    )
    if draw(st.booleans()):
        start, length = draw(st.integers(0, len(form))), draw(st.sampled_from([0, 0, 1, 2, 7, 1 << 20]))
        form = form[:start] + draw(st.binary(max_size=3) | st.just(b"\r\n" * 70)) + form[start + length :]
    return form, draw(st.sampled_from(FORM_KINDS))


@pytest.mark.parametrize(("method", "path"), FORMS)
def test_no_form_brings_a_route_down(loop: Loop, method: str, path: str) -> None:
    operation = loop.document["paths"][path][method.lower()]

    @examples(80)
    @given(forms(), st.booleans())
    def ask(form: tuple[bytes, str], by_router: bool) -> None:
        check(loop.runner.run(loop.send(method, path, *form, by_router=by_router)), operation, loop.document)

    ask()
    assert not loop.engine.live


# ---- lines of batches ----

ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
LINE_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "custom_id": {"type": "string"}, "method": {"const": "POST"}, "url": {"enum": ENDPOINTS},
        "body": {"type": "object"},
    },
    "required": ["custom_id", "method", "url", "body"],
}  # fmt: skip


async def batch_of(loop: Loop, lines: bytes, endpoint: str) -> Any:
    """Return a batch of those lines as it has ended."""
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + lines + b"\r\n--b--\r\n"
    reply = await loop.send("POST", "/v1/files", form, "multipart/form-data; boundary=b")
    assert reply.status == 200, reply
    body = {"input_file_id": json.loads(reply.body)["id"], "endpoint": endpoint}
    batch = await loop.json("POST", "/v1/batches", body)
    async with asyncio.timeout(PATIENCE_S):
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.005)
            batch = await loop.json("GET", f"/v1/batches/{batch['id']}")
    return batch


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_line_of_a_batch_fails_by_the_servers_fault(loop: Loop, endpoint: str) -> None:
    content = loop.document["paths"][endpoint]["post"]["requestBody"]["content"]
    values = values_of(content["application/json"]["schema"], loop.document)
    drawn: list[Any] = []

    @examples(40)
    @given(values | spoilt(values))
    def draw(body: Any) -> None:
        if isinstance(body, dict) and encoded(deep()) not in encoded(body):  # else the file is none
            drawn.append(body)

    draw()
    lines = [
        encoded({"custom_id": str(i), "method": "POST", "url": endpoint, "body": body}) for i, body in enumerate(drawn)
    ]
    batch = loop.runner.run(batch_of(loop, b"\n".join(lines), endpoint))
    assert batch["status"] == "completed", batch
    counts = batch["request_counts"]
    assert counts["completed"] + counts["failed"] == counts["total"] == len(lines)
    errors = loop.runner.run(loop.send("GET", f"/v1/files/{batch['error_file_id']}/content", None, ""))
    for line in map(json.loads, errors.body.splitlines()):
        assert line["response"]["status_code"] < 500, (line, drawn[int(line["custom_id"])])
    assert not loop.engine.live


def test_no_file_of_lines_brings_a_batch_down(loop: Loop) -> None:
    line = values_of(LINE_SCHEMA, loop.document)
    texts = st.one_of(line.map(encoded), spoilt(line).map(encoded), st.binary(max_size=30), st.just(b"\xef\xbb\xbf{}"))

    @examples(40)
    @given(st.lists(texts, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\0"]), st.sampled_from(ENDPOINTS))
    def ask(lines: list[bytes], between: bytes, endpoint: str) -> None:
        batch = loop.runner.run(batch_of(loop, between.join(lines), endpoint))
        errors = batch["errors"]["data"] if batch["errors"] else []
        assert not any(error["code"] == "internal_error" for error in errors), errors

    ask()
    assert not loop.engine.live


# ---- sessions ----

SESSIONS, RIDS = st.sampled_from(["a", "b", ""]), st.sampled_from(["r1", "r2", "r3"])
SESSION_PARAMS = st.fixed_dictionaries(
    {"id": SESSIONS},
    optional={
        "rid": RIDS | st.just(""), "offset": st.sampled_from([0, 1, 5, -1, -300, 1 << 53]), "replace": st.booleans(),
        "drop_previous_output": st.booleans(),
    },
)  # fmt: skip
GENERATE = st.fixed_dictionaries(
    {"session_params": SESSION_PARAMS | spoilt(SESSION_PARAMS), "text": st.sampled_from(["", "Hi", ["Hi", "Ho"]])},
    optional={
        "rid": RIDS, "stream": st.booleans(), "sampling_params": st.sampled_from([{}, {"n": 2}, {"max_new_tokens": 0}]),
    },
)  # fmt: skip
OPEN = st.fixed_dictionaries({"session_id": SESSIONS, "capacity_of_str_len": st.sampled_from([0, 1, 40])})
CLOSE = st.fixed_dictionaries({"session_id": SESSIONS})
CALLS = st.one_of(
    st.tuples(st.just("/open_session"), OPEN), st.tuples(st.just("/close_session"), CLOSE),
    st.tuples(st.just("/generate"), GENERATE), st.tuples(st.just("/generate"), GENERATE),
)  # fmt: skip


def test_no_order_of_calls_brings_a_session_down(loop: Loop) -> None:
    @examples(80)
    @given(st.lists(st.lists(CALLS, min_size=1, max_size=3), max_size=4), st.booleans())
    def ask(rounds: list[list[tuple[str, Any]]], by_router: bool) -> None:
        async def send(path: str, body: Any) -> Reply:
            return await loop.send("POST", path, encoded(body), "application/json", by_router=by_router)

        async def run() -> None:
            for calls in rounds:  # those of a round at once
                replies = await asyncio.gather(*(send(*call) for call in calls))
                for (path, _), reply in zip(calls, replies, strict=True):
                    check(reply, loop.document["paths"][path]["post"], loop.document)

        loop.runner.run(run())

    ask()
    assert not loop.engine.live


# ---- the router ----


def test_no_request_brings_the_router_down(loop: Loop) -> None:
    bodies = {}
    for method, path in WITH_BODY:
        content = loop.document["paths"][path][method.lower()]["requestBody"]["content"]
        bodies[method, path] = bodies_of(content["application/json"]["schema"], loop.document)

    @examples(120)
    @given(st.sampled_from(sorted(bodies)).flatmap(lambda key: st.tuples(st.just(key), bodies[key])))
    def ask(drawn: tuple[tuple[str, str], tuple[bytes, str]]) -> None:
        (method, path), body = drawn
        operation = loop.document["paths"][path][method.lower()]
        check(loop.runner.run(loop.send(method, path, *body, by_router=True)), operation, loop.document)

    ask()


HOSTS = st.text("a.:@[]%/?#1-\0☃ ", max_size=12) | st.sampled_from(["a" * 64, "a..b", "[::1]", "127.0.0.1", "xn--a"])
TAILS = ["", ":1", ":0", ":99999", ":x", "/a b", "/%00"]
WORKER_URLS = st.builds(
    "{}{}{}".format, st.sampled_from(["http://", "https://", "ftp://", ""]), HOSTS, st.sampled_from(TAILS)
)


def test_no_url_of_a_worker_brings_the_router_down(loop: Loop) -> None:
    @examples(60)
    @given(WORKER_URLS, st.sampled_from(["localhost", "[::1", "127.0.0.1:x", "a@b:9", ""]))
    def ask(url: str, host: str) -> None:
        async def run() -> None:
            async with asyncio.timeout(PATIENCE_S), routing(connect_timeout=0.2, health_check_timeout=0.2) as router:
                added = await router.post("/workers", json={"url": url}, headers={"Host": host} if host else {})
                assert added.status < 500, await added.text()
                assert (await router.get("/workers")).status == 200
                removed = await router.delete("/workers", params={"url": url})
                assert removed.status == (200 if added.status == 201 else 400)

        loop.runner.run(run())

    ask()


# What HTTP's grammar does not allow, or nearly so; each closes its connection.
LINES = [
    b"GET *", b"GET http://evil.example/health", b"GET //@:0/", b"GET /\xff", b"GET /%ff%00", b"GET health",
    b"CONNECT evil:80", b"POST /workers", b"POST /generate", b"POST /flush_cache", b"GET /v1/models",
    b"GET /v1/files?limit=" + b"9" * 5000,
]  # fmt: skip
HEADERS = [
    b"Host: [::1", b"Host: a@b:99999999", b"Host: \xff", b"X-A: \xff\xfe", b"Origin: \xff", b"Origin: http://[",
    b"Authorization: Bearer \xff", b"Content-Type: \xff", b"Content-Type: multipart/x; boundary=\xff",
    b"Content-Type: application/json; charset=\xff", b"Content-Encoding: \xff", b"Content-Encoding: br",
    b"Content-Encoding: gzip", b"Expect: 100-continue", b"Expect: x", b"Upgrade: websocket", b"Range: bytes=x",
]  # fmt: skip


def test_no_header_brings_the_server_or_the_router_down(loop: Loop) -> None:
    async def status(client: TestClient[Any, Any], request: bytes) -> int:
        assert client.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(request)
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readline()
        writer.close()
        return int(head.split()[1])

    async def run() -> None:
        for line in LINES:
            for header in HEADERS:
                host = b"" if header.startswith(b"Host") else b"Host: localhost\r\n"
                request = (
                    line + b"HTTP/1.1\r\n" + host + header + b"\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
                )
                for client in (loop.client, loop.router):
                    assert await status(client, request) < 500, (line, header, client is loop.router)

    loop.runner.run(run())


# ---- the document ----


def test_every_route_is_in_the_document_and_nothing_else(loop: Loop) -> None:
    assert loop.client.app is not None
    assert sorted(routes_of(loop.client.app)) == sorted(OPERATIONS)
    described = {(method.upper(), path) for path, item in loop.document["paths"].items() for method in item}
    assert described == set(OPERATIONS)


def test_the_document_is_whole(loop: Loop) -> None:
    document = loop.document
    assert document["openapi"].startswith("3.1")
    for reference in re.findall(r'"\$ref": ?"([^"]+)"', json.dumps(document)):
        assert resolve({"$ref": reference}, document)
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)

"""Every route of the served OpenAPI document, asked what the document allows and what it does not.

Whatever is sent, the answer is one that the document announces: never a 5xx, never none at all. Bodies are drawn from
the schemas, and then, in part, spoilt.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.declared import MAX_INT
from server.watch.openapi import OPERATIONS, routes_of
from tests.fake_engine import FakeEngine, events_of, serving

PATIENCE_S = 10.0
EXAMPLES = 60  # an operation with a body; deterministic, so that a run proves as much as the one before
Schema = dict[str, Any]


class Loop:
    """An event loop with a server and a client on it, for tests that are not coroutines."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner, self.stack = runner, AsyncExitStack()
        self.engine = FakeEngine(context_length=2048)

    async def start(self) -> None:
        self.client: TestClient[Any, Any] = await self.stack.enter_async_context(
            serving(self.engine, enable_metrics=True)
        )
        response = await self.client.get("/openapi.json")
        self.document: Schema = await response.json()

    async def send(self, method: str, path: str, body: bytes | None, kind: str) -> "Reply":
        headers = {"Content-Type": kind} if body is not None else {}
        async with asyncio.timeout(PATIENCE_S):
            response = await self.client.request(method, path, data=body, headers=headers)
            return Reply(response.status, response.content_type, await response.read())


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
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
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
                owner[draw(TEXT)] = draw(JSON_VALUES)
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

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(bodies_of(schema, loop.document))
    def ask(body: tuple[bytes, str]) -> None:
        check(loop.runner.run(loop.send(method, path, *body)), operation, loop.document)

    ask()
    if path == "/v1/responses":  # those in the background end in their own time
        loop.runner.run(loop.engine.until(lambda: not loop.engine.live))
    left, loop.engine.live = loop.engine.live, {}
    assert not left, "a request outlived its answer"


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

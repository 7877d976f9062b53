"""The router: who gets a request, what passes through, retries, workers that come and go."""

import asyncio
import base64
import gzip
import json
import random
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from engine.replicas.balance import METHODS
from server.fleet.prompts import prompt_of
from server.fleet.router import Router, RouterConfig, main
from tests.client import Client
from tests.fake_engine import FakeEngine, serving
from tests.server_processes import reserved_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LONG = "A long text that several questions are about. " * 20


class FakeWorker:
    """Answers every request with its name, unless `answer` says otherwise."""

    def __init__(self, name: str) -> None:
        self.name, self.is_healthy, self.status = name, True, ""
        self.answer: Handler = self.say_name
        self.seen: list[tuple[str, dict[str, str], bytes]] = []  # (path with query, headers, body)

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/health", self.health), web.route("*", "/{path:.*}", self.handle)])
        return app

    async def health(self, _: web.Request) -> web.Response:
        if self.status == "silent":
            await asyncio.Event().wait()
        return web.json_response({"status": self.status}, status=200 if self.is_healthy else 503)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.raw_path, dict(request.headers), await request.read()))
        return await self.answer(request)

    async def say_name(self, _: web.Request) -> web.Response:
        return web.Response(text=self.name)

    def says(self, status: int, text: str = "") -> None:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(status=status, text=text or f"{self.name} says {status}")

        self.answer = answer


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    """Return the URL of a server of `app`."""
    server = TestServer(app)
    async with server:
        yield url_of(server)


@pytest.fixture
def free_port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.fixture
def gone(free_port: int) -> str:
    """Return the URL of a worker that does not listen."""
    return f"http://127.0.0.1:{free_port}"


def url_of(server: TestServer | Client) -> str:
    return str(server.make_url("")).rstrip("/")


@asynccontextmanager
async def routing(*workers: FakeWorker | str, **options: Any) -> AsyncIterator[Client]:
    """Yield a client of a router; a worker given by its URL is someone else's to run."""
    async with AsyncExitStack() as stack:
        urls = [w if isinstance(w, str) else await stack.enter_async_context(listening(w.app())) for w in workers]
        settings = {"policy": "round_robin", "health_check_interval": 3600.0, **options}
        app = Router(RouterConfig(worker_urls=urls, **settings)).build_app()
        server = TestServer(app)
        await server.start_server(auto_decompress=False)  # as `main` does
        yield await stack.enter_async_context(TestClient(server, auto_decompress=False))


async def answers(client: Client, count: int, **body: Any) -> list[str]:
    return [await (await client.post("/generate", json={"text": "Hi", **body})).text() for _ in range(count)]


async def worker_states(client: Client) -> dict[str, Any]:
    return {one["url"]: one for one in (await (await client.get("/workers")).json())["workers"]}


async def until_healthy(client: Client, count: int) -> None:
    async with asyncio.timeout(60):
        while sum(one["is_healthy"] for one in (await worker_states(client)).values()) != count:
            pass


def cut_off(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


# ---- what passes through ----


async def test_a_request_passes_through_unchanged() -> None:
    worker = FakeWorker("a")
    headers = {
        "Authorization": "Bearer mine", "User-Agent": "test", "X-Mine": "1", "Cookie": "k=v", "Accept-Encoding": "br",
        "Content-Type": "application/json",
    }  # fmt: skip
    async with routing(worker) as client:
        for body in (b'{"text" :  "Hi"}', b"no JSON", b""):
            path = "/v1/x%2Fy%2525/z?q=a%20b&q=%C3%BC"
            answer = await client.post(aiohttp.client.URL(path, encoded=True), data=body, headers=headers)
            assert answer.status == 200
    for (path, seen, got), body in zip(worker.seen, (b'{"text" :  "Hi"}', b"no JSON", b""), strict=True):
        assert (path, got) == ("/v1/x%2Fy%2525/z?q=a%20b&q=%C3%BC", body)
        assert {name: seen[name] for name in headers} == headers
        assert seen["Host"] != "a" and "Transfer-Encoding" not in seen


async def test_an_answer_passes_through_unchanged() -> None:
    worker = FakeWorker("a")

    async def answer(_: web.Request) -> web.Response:
        response = web.Response(status=418, reason="Short and stout", body=b"\x1f\x8bnot really gzip")
        response.headers.extend({"Content-Encoding": "gzip", "X-Its": "1", "Keep-Alive": "timeout=1"})
        response.headers.add("Set-Cookie", "a=1")
        response.headers.add("Set-Cookie", "b=2")
        return response

    worker.answer = answer
    async with routing(worker) as client:
        for method in ("GET", "POST", "PUT", "DELETE"):
            got = await client.request(method, "/any")
            assert (got.status, got.reason, await got.read()) == (418, "Short and stout", b"\x1f\x8bnot really gzip")
            assert got.headers.getall("Set-Cookie") == ["a=1", "b=2"]
            assert (got.headers["X-Its"], got.headers["Content-Length"]) == ("1", "17")
            assert "Keep-Alive" not in got.headers
        assert (await client.head("/any")).status == 418


async def test_each_piece_of_a_streamed_answer_is_passed_on_as_it_comes() -> None:
    worker, received = FakeWorker("a"), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for i in range(3):
            await response.write(b"data: %d\n\n" % i)
            await received.wait()
            received.clear()
        return response

    worker.answer = answer
    async with routing(worker) as client:
        got = await client.post("/generate", json={})
        assert got.content_type == "text/event-stream"
        for i in range(3):
            assert await got.content.readany() == b"data: %d\n\n" % i
            received.set()
        assert await got.content.readany() == b""


async def test_a_stream_of_our_server_is_the_same_through_the_router() -> None:
    body = {"text": "Hi", "stream": True, "rid": "mine"}
    async with serving(FakeEngine()) as direct, routing(url_of(direct)) as client:
        expected = await (await direct.post("/generate", json=body)).read()
        assert b"[DONE]" in expected
        assert await (await client.post("/generate", json=body)).read() == expected


async def test_a_worker_writes_no_faster_than_the_client_reads() -> None:
    worker, piece, count = FakeWorker("a"), bytes(1 << 20), 128
    written = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(count):
            await response.write(piece)
            written += 1
        return response

    worker.answer = answer
    async with routing(worker) as client:
        got = await client.get("/big")
        before = -1
        while before != written:
            before = written
            await asyncio.sleep(0.2)
        assert written < count / 2
        assert len(await got.read()) == count * len(piece)


async def test_a_client_that_leaves_takes_its_request_along() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as worker, routing(url_of(worker)) as client:
        got = asyncio.create_task(client.post("/generate", json={"text": "Hi", "rid": "waiting"}))
        await engine.until(lambda: "waiting" in engine.live)
        got.cancel()
        await engine.until(lambda: engine.aborted == ["waiting"])
        streaming = asyncio.create_task(client.post("/generate", json={"text": "Hi", "rid": "s", "stream": True}))
        await engine.until(lambda: "s" in engine.live)
        engine.emit(engine.live["s"], "Hello")
        (await streaming).close()
        await engine.until(lambda: engine.aborted == ["waiting", "s"])
        async with asyncio.timeout(60):
            while [one["load"] for one in (await worker_states(client)).values()] != [0]:
                pass


async def test_the_router_reads_a_long_body_of_its_own() -> None:
    async with routing(FakeWorker("a")) as client:
        answer = await client.post("/workers", json={"url": 7, "unknown": "x" * 300_000})
        assert answer.status == 400
        assert "url" in await answer.text()


@pytest.mark.parametrize("body", [b"abc", b"x" * 300_000], ids=len)
async def test_a_body_beside_head_is_left_out_as_if_it_could_be_read(body: bytes) -> None:
    async with serving(FakeEngine()) as ours, routing(url_of(ours)) as client:
        for encoding in ("br", "zstd", "identity"):
            answer = await client.request("HEAD", "/v1/models", data=body, headers={"Content-Encoding": encoding})
            assert answer.status == 200
            answer = await client.request("HEAD", "/generate", data=body, headers={"Content-Encoding": encoding})
            assert answer.status == 405
            answer = await client.post("/v1/models", data=body, headers={"Content-Encoding": encoding})
            assert 400 <= answer.status < 500


@pytest.mark.parametrize("policy", METHODS)
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_passes_as_it_came_and_is_read_by_the_worker(policy: str, encoding: str) -> None:
    body = json.dumps({"text": LONG}).encode()
    sent = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    worker, engine = FakeWorker("a"), FakeEngine(context_length=4096)
    raw = TestServer(worker.app())
    await raw.start_server(auto_decompress=False)
    async with raw, serving(engine) as ours:
        async with routing(url_of(raw), policy=policy) as client:
            assert (await client.post("/generate", data=sent, headers=headers)).status == 200
            ((_, seen, got),) = worker.seen
            assert (got, seen["Content-Encoding"], seen["Content-Length"]) == (sent, encoding, str(len(sent)))
        async with routing(url_of(ours), policy=policy) as client:
            answer = await client.post("/generate", data=sent, headers=headers)
            assert answer.status == 200, await answer.text()
            assert bytes(engine.requests[0].input_ids) == LONG.encode()
            assert (await client.post("/generate", data=b"not gzip", headers=headers)).status == 400
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", b"{}", filename="a")
            assert (await client.post("/v1/files", data=form)).status == 200


async def test_compressed_prompts_with_the_same_head_go_to_the_same_worker() -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    async with routing(*map(FakeWorker, "abc"), policy="cache_aware") as client:

        async def ask(text: str, **more: Any) -> str:
            data = gzip.compress(json.dumps({"text": text, **more}).encode())
            return await (await client.post("/generate", data=data, headers=headers)).text()

        home = await ask(LONG + "Who?")
        assert await ask("short") != home
        assert [await ask(LONG + "Why?") for _ in range(4)] == [home] * 4
        assert [await ask(LONG, session_params={"id": "s"}) for _ in range(2)] == ["a", "a"]


# ---- who gets a request ----


async def test_in_turn() -> None:
    async with routing(FakeWorker("a"), FakeWorker("b")) as client:
        assert await answers(client, 4) == ["a", "b", "a", "b"]


async def test_the_least_busy_worker_is_the_one_with_the_fewest_requests() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    asked, release = asyncio.Event(), asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        asked.set()
        await release.wait()
        return web.Response()

    a.answer = wait
    async with routing(a, b, policy="shortest_queue") as client:
        waiting = asyncio.create_task(client.post("/generate", json={"text": "Hi"}))
        await asked.wait()
        assert await answers(client, 3) == ["b", "b", "b"]
        release.set()
        await waiting


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        ("/generate", {"text": LONG + "Who?"}, {"text": LONG + "Why?", "stream": True}),
        ("/generate", {"input_ids": [*range(1000)]}, {"input_ids": [*range(999), 7]}),
        ("/v1/completions", {"prompt": LONG}, {"prompt": LONG + "And?", "max_tokens": 3}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": LONG}]},
            {"messages": [{"role": "user", "content": LONG}, {"role": "user", "content": "And?"}]},
        ),
        ("/v1/messages", {"system": LONG, "messages": ["a"]}, {"messages": ["b"], "system": LONG}),
        ("/v1/responses", {"instructions": LONG, "input": "a"}, {"instructions": LONG, "input": "b"}),
    ],
)
async def test_prompts_with_the_same_head_go_to_the_same_worker(path: str, first: Any, second: Any) -> None:
    async with routing(*map(FakeWorker, "abc"), policy="cache_aware") as client:

        async def ask(body: Any) -> str:
            return await (await client.post(path, json=body)).text()

        home = await ask(first)
        assert await ask({"text": "short"}) != home
        assert [await ask(second) for _ in range(4)] == [home] * 4
        assert await ask({"cache_salt": "other", **second}) != home


@pytest.mark.parametrize("policy", METHODS)
async def test_every_policy_leaves_out_who_is_not_healthy(policy: str) -> None:
    workers = [FakeWorker(name) for name in "abc"]
    workers[1].is_healthy = False
    async with routing(*workers, policy=policy) as client:
        assert set(await answers(client, 6, text=LONG)) <= {"a", "c"}


# ---- retries ----


@pytest.mark.parametrize("policy", METHODS)
@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_what_a_worker_refuses_goes_to_another(status: int, policy: str) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    a.says(status)
    async with routing(a, b, policy=policy) as client:
        assert await answers(client, 3, text=LONG) == ["b", "b", "b"]
        assert all(body == b.seen[0][2] for _, _, body in [*a.seen, *b.seen])
        assert all(one["is_healthy"] for one in (await worker_states(client)).values())


async def test_the_clients_own_errors_are_not_retried() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    a.says(400)
    async with routing(a, b) as client:
        got = await client.post("/generate", json={})
        assert (got.status, await got.text(), b.seen) == (400, "a says 400", [])


async def test_if_all_refuse_the_last_answer_is_passed_on() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    a.says(503)
    b.says(429, "full")
    async with routing(a, b) as client:
        got = await client.post("/generate", json={})
        assert (got.status, await got.text()) == (429, "full")


async def test_the_number_of_retries_is_bounded() -> None:
    workers = [FakeWorker(name) for name in "abcd"]
    for worker in workers:
        worker.says(503)
    async with routing(*workers, max_retries=2) as client:
        assert (await client.post("/generate", json={})).status == 503
        assert sum(len(worker.seen) for worker in workers) == 3
    async with routing(*workers, max_retries=0) as client:
        assert (await client.post("/generate", json={})).status == 503
        assert sum(len(worker.seen) for worker in workers) == 4


async def test_an_answer_that_is_lost_before_its_first_byte_is_asked_for_again() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")

    async def cut_off_at_once(request: web.Request) -> web.StreamResponse:
        cut_off(request)
        return web.Response()

    async def cut_off_after_the_headers(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        cut_off(request)
        return response

    for answer in (cut_off_at_once, cut_off_after_the_headers):
        a.answer = answer
        async with routing(a, b) as client:
            assert await answers(client, 1) == ["b"]
            assert len(a.seen) == 1
        a.seen.clear()


async def test_an_answer_that_is_lost_later_ends_too_early_and_is_not_asked_for_again() -> None:
    a, b, received = FakeWorker("a"), FakeWorker("b"), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await received.wait()
        cut_off(request)
        return response

    a.answer = answer
    async with routing(a, b) as client:
        got = await client.post("/generate", json={})
        assert await got.content.readany() == b"data: 1\n\n"
        received.set()
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.read()
        assert not b.seen


async def test_a_file_is_sent_on_as_it_arrives_and_never_twice() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    a.says(503)
    async with routing(a, b, max_body_bytes=1000) as client:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", bytes(100_000), filename="x.jsonl")
        got = await client.post("/v1/files", data=form)
        assert got.status == 503
        assert len(a.seen) == 1 and len(a.seen[0][2]) > 100_000 and not b.seen
        got = await client.post("/generate", json={"text": "x" * 2000})
        assert got.status == 413
        assert "1000 bytes" in await got.text()


# ---- workers come and go ----


async def test_a_worker_that_cannot_be_reached_leaves_the_rotation_and_returns(free_port: int, gone: str) -> None:
    a = FakeWorker("a")
    async with routing(a, gone, health_check_interval=0.01) as client:
        assert await answers(client, 3) == ["a"] * 3
        state = (await worker_states(client))[gone]
        assert not state["is_healthy"] and "connect" in state["failure"].lower()
        server = TestServer(FakeWorker("back").app(), port=free_port)
        await server.start_server()
        await until_healthy(client, 2)
        assert set(await answers(client, 4)) == {"a", "back"}
        await server.close()
        assert set(await answers(client, 4)) == {"a"}


async def test_a_worker_that_fails_is_looked_at_before_the_next_health_check_is_due() -> None:
    a, b = FakeWorker("a"), TestServer(FakeWorker("b").app())
    async with b, routing(a, url_of(b), health_check_interval=3600.0) as client:
        await until_healthy(client, 2)
        await b.close()
        assert await answers(client, 2) == ["a", "a"]
        await until_healthy(client, 1)


async def test_a_worker_that_says_it_is_not_healthy_leaves_the_rotation_and_returns() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    async with routing(a, b, health_check_interval=0.01) as client:
        for is_healthy, expected in ((False, {"b"}), (True, {"a", "b"})):
            a.is_healthy = is_healthy
            await until_healthy(client, len(expected))
            assert set(await answers(client, 4)) == expected


@pytest.mark.parametrize("status", ["silent", "stuck"])
async def test_what_has_not_begun_on_a_worker_that_hangs_goes_to_another(status: str) -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    asked = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    a.answer = hang
    async with routing(a, b, policy="round_robin", health_check_interval=0.05, health_check_timeout=3.0) as client:
        waiting = asyncio.create_task(client.post("/generate", json={"text": "Hi"}))
        await asked.wait()
        flushing = asyncio.create_task(client.post("/flush_cache"))
        a.status, a.is_healthy = status, False
        async with asyncio.timeout(60):
            assert await (await waiting).text() == "b"
            assert (await flushing).status == 502
        assert [one["load"] for one in (await worker_states(client)).values()] == [0, 0]


async def test_what_runs_on_a_worker_that_hangs_waits_for_it_if_there_is_no_other() -> None:
    a, release, asked = FakeWorker("a"), asyncio.Event(), asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        asked.set()
        await release.wait()
        return web.Response(text="a after all")

    a.answer = wait
    async with routing(a, health_check_interval=0.05, health_check_timeout=3.0) as client:
        waiting = asyncio.create_task(client.post("/generate", json={"text": "Hi"}))
        await asked.wait()
        a.status = "silent"
        await until_healthy(client, 0)
        await asyncio.sleep(0.2)
        release.set()
        assert await (await waiting).text() == "a after all"


async def test_a_worker_that_is_shut_down_ends_its_answers() -> None:
    a, b, release, asked = FakeWorker("a"), FakeWorker("b"), asyncio.Event(), asyncio.Event()

    async def wait(_: web.Request) -> web.Response:
        asked.set()
        await release.wait()
        return web.Response(text="a to the end")

    a.answer = wait
    async with routing(a, b, health_check_interval=0.05) as client:
        waiting = asyncio.create_task(client.post("/generate", json={"text": "Hi"}))
        await asked.wait()
        a.status, a.is_healthy = "stopping", False
        await until_healthy(client, 1)
        await asyncio.sleep(0.2)
        release.set()
        assert await (await waiting).text() == "a to the end"
        assert not b.seen


async def test_when_all_are_down_the_error_says_why(gone: str) -> None:
    worker = FakeWorker("a")
    worker.is_healthy = False
    async with routing(worker, gone) as client:
        assert (await client.get("/health")).status == 503
        for path in ("/generate", "/v1/chat/completions"):
            got = await client.post(path, json={})
            assert got.status == 503
            error = (await got.json())["error"]
            assert "/health answers 503" in error["message"] and gone in error["message"]
        assert error["type"] == "service_unavailable_error"
    async with routing() as client:
        got = await client.get("/v1/models")
        assert (got.status, "has no workers" in await got.text()) == (503, True)
        assert (await client.post("/flush_cache")).status == 503


async def test_workers_are_added_and_removed() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    async with listening(a.app()) as url_a, listening(b.app()) as url_b, routing() as client:
        got = await client.post("/workers", json={"url": url_a + "/"})
        assert (got.status, await got.json()) == (201, {"url": url_a, "is_healthy": True})
        assert await answers(client, 2) == ["a", "a"]
        assert (await client.post("/add_worker", params={"url": url_b})).status == 201
        assert (await (await client.get("/list_workers")).json())["urls"] == [url_a, url_b]
        assert set(await answers(client, 4)) == {"a", "b"}
        assert (await client.delete("/workers", params={"url": url_a})).status == 200
        assert await answers(client, 2) == ["b", "b"]
        assert (await client.post("/workers", json={"url": url_a})).status == 201
        assert set(await answers(client, 4)) == {"a", "b"}
        assert (await client.post("/remove_worker", params={"url": url_b})).status == 200
        assert (await (await client.get("/health")).json()) == {"status": "ok", "num_workers": 1, "num_healthy": 1}
        for body in ({"url": url_a}, {"url": "nonsense"}, {"url": "http://a:70000"}, {"url": "http://[::1"}, {}):
            got = await client.post("/workers", json=body)
            assert (got.status, (await got.json())["error"]["field"]) == (400, "url")
        assert (await client.delete("/workers")).status == 400


async def test_with_a_key_only_its_owner_sees_and_changes_workers() -> None:
    worker = FakeWorker("a")
    async with routing(worker, api_key="secret") as client:
        for method, path in (
            ("GET", "/workers"),
            ("POST", "/workers"),
            ("DELETE", "/workers"),
            ("GET", "/list_workers"),
            ("POST", "/add_worker"),
            ("POST", "/remove_worker"),
        ):
            for headers in ({}, {"Authorization": "Bearer wröng"}):
                assert (await client.request(method, path, headers=headers)).status == 401
        assert (await client.get("/workers", headers={"Authorization": "Bearer secret"})).status == 200
        assert (await client.get("/health")).status == 200
        assert await answers(client, 1) == ["a"]  # whose key is right is the worker's to say


CHANGES = (
    ("POST", "/workers", {"json": {"url": "http://a:1"}}),
    ("POST", "/add_worker", {"params": {"url": "http://a:1"}}),
    ("DELETE", "/workers", {"params": {"url": "http://b:1"}}),
    ("POST", "/remove_worker", {"params": {"url": "http://b:1"}}),
)


@pytest.mark.parametrize("api_key", [None, "secret"])
@pytest.mark.parametrize(("method", "path", "request_options"), CHANGES)
async def test_a_web_page_cannot_change_the_workers(
    method: str, path: str, request_options: dict[str, Any], api_key: str | None
) -> None:
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with routing("http://b:1", api_key=api_key) as client:
        for headers in (
            {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"},
            {"Origin": "null"},
        ):  # fmt: skip
            got = await client.request(method, path, headers={**key, **headers}, **request_options)
            assert (got.status, "other sites" in await got.text()) == (403, True)
        headers = {"Sec-Fetch-Site": "same-origin", "Origin": url_of(client)}
        got = await client.request(method, path, headers={**key, **headers}, **request_options)
        assert got.status in (200, 201)


@pytest.mark.parametrize(("method", "path", "request_options"), CHANGES)
async def test_without_a_key_other_hosts_cannot_change_the_workers(
    method: str, path: str, request_options: dict[str, Any]
) -> None:
    foreign = ({"Host": "evil.example:30000"}, {"X-Forwarded-For": "1.2.3.4"}, {"Forwarded": "for=1.2.3.4"})
    async with routing("http://b:1", host="0.0.0.0") as client:
        for headers in (*foreign, {"Host": "[::1"}, {"Host": "a@b:99999999"}):
            got = await client.request(method, path, headers=headers, **request_options)
            assert (got.status, "--api-key" in await got.text()) == (403, True)
        assert (await client.request(method, path, headers={"Host": "localhost:1"}, **request_options)).status < 300
    async with routing("http://b:1", api_key="secret", host="0.0.0.0") as client:
        key = {"Authorization": "Bearer secret"}
        assert (await client.request(method, path, headers={**foreign[0], **key}, **request_options)).status < 300


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_workers_are_added_by_json_only(kind: str | None) -> None:
    async with routing() as client:
        headers = {} if kind is None else {"Content-Type": kind}
        skipped: dict[str, Any] = {"skip_auto_headers": ["Content-Type"]} if kind is None else {}
        body = b'{"url": "http://a:1"}'
        got = await client.post("/workers", params={"url": "http://a:1"}, data=body, headers=headers, **skipped)
        assert got.status == 400
        assert await worker_states(client) == {}


# ---- web pages ----


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}, {"Origin": "null"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
    ],
    ids=str,
)  # fmt: skip
async def test_a_page_of_another_site_reaches_no_worker(headers: dict[str, str]) -> None:
    worker = FakeWorker("a")
    async with routing(worker) as client:
        for method, path in (
            ("POST", "/generate"), ("POST", "/v1/chat/completions"), ("POST", "/flush_cache"), ("GET", "/flush_cache"),
            ("GET", "/start_profile"), ("POST", "/pause_generation"), ("DELETE", "/v1/files/x"), ("POST", "/any"),
        ):  # fmt: skip
            got = await client.request(method, path, headers=headers, data=b"{}")
            assert (got.status, "--allowed-origins" in await got.text()) == (403, True), (method, path)
        preflight = {"Access-Control-Request-Method": "POST", **headers}
        got = await client.options("/generate", headers=preflight)
        assert got.status == 204 and not [name for name in got.headers if name.startswith("Access-Control")]
        assert (await client.get("/get_model_info", headers=headers)).status == 200, "which the page cannot read"
    assert [path for path, _, _ in worker.seen] == ["/get_model_info"]


async def test_our_own_and_listed_pages_reach_workers_which_know_nothing_of_them() -> None:
    """A worker's address is not the router's: to it, every page would be one of another site."""
    engine = FakeEngine()
    chat = "https://chat.example"
    async with serving(engine) as worker, routing(url_of(worker), allowed_origins=[chat]) as client:
        for headers in (
            {"Origin": chat, "Sec-Fetch-Site": "cross-site"}, {"Origin": url_of(client)},
            {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
        ):  # fmt: skip
            for stream in (False, True):
                got = await client.post("/generate", json={"text": "Hi", "stream": stream}, headers=headers)
                assert got.status == 200
                allowed = got.headers.getall("Access-Control-Allow-Origin", [])
                assert allowed == [headers["Origin"]][: "proxy" not in headers["Origin"]]
        got = await client.options("/generate", headers={"Origin": chat, "Access-Control-Request-Method": "POST"})
        assert (got.status, got.headers["Access-Control-Allow-Origin"]) == (204, chat)


async def test_a_router_on_loopback_answers_to_its_own_names_only() -> None:
    worker = FakeWorker("a")
    async with routing(worker, allowed_hosts=["llm.example"]) as client:
        for name, status in (("evil.example", 403), ("localhost", 200), ("127.0.0.1:1", 200), ("llm.example", 200)):
            for path in ("/get_model_info", "/health", "/workers", "/generate"):
                assert (await client.get(path, headers={"Host": name})).status == status, (name, path)
    async with routing(worker, host="0.0.0.0") as client:
        assert (await client.get("/health", headers={"Host": "any.example"})).status == 200


# ---- what concerns all workers, or one of them ----


@pytest.mark.parametrize("host", ["a..b", "a" * 64, ".", "x." + "y" * 64 + ".z"])
async def test_a_worker_whose_name_no_host_can_have_is_refused(host: str) -> None:
    """Looking one up raises what is no error of a connection: the checks of all workers ended with it."""
    async with routing() as client:
        added = await client.post("/workers", json={"url": f"http://{host}:1"})
        assert added.status == 400 and "url must be" in await added.text()
        assert (await (await client.get("/workers")).json())["urls"] == []


async def test_a_prompt_too_deep_to_be_compared_goes_to_a_worker_as_it_is() -> None:
    worker = FakeWorker("a")
    async with routing(worker, policy="cache_aware") as client:
        body = b'{"messages": ' + b"[" * 400 + b"]" * 400 + b"}"
        assert (await client.post("/v1/chat/completions", data=body)).status == 200
    assert worker.seen[-1][2] == body


async def test_an_abort_and_a_flush_reach_every_worker() -> None:
    engines = FakeEngine(is_manual=True), FakeEngine(is_manual=True)
    async with (
        serving(engines[0]) as first,
        serving(engines[1]) as second,
        routing(url_of(first), url_of(second)) as client,
    ):
        body = {"text": "Hi", "rid": "mine"}
        tasks = [asyncio.create_task(client.post("/generate", json=body)) for _ in engines]
        for engine in engines:
            await engine.until(lambda engine=engine: "mine" in engine.live)  # type: ignore[misc]
        got = await client.post("/flush_cache")
        assert got.status == 400
        message = (await got.json())["error"]["message"]
        assert (
            message.startswith("2 of 2 workers failed")
            and url_of(first) in message
            and "1 requests are running" in message
        )
        assert (await client.post("/abort_request", json={"rid": "mine"})).status == 200
        await asyncio.gather(*tasks)
        got = await client.post("/flush_cache")
        assert (got.status, await got.text()) == (200, "Cache flushed.\n")


async def test_a_flush_names_the_worker_that_could_not_be_reached(gone: str) -> None:
    async with routing(FakeWorker("a"), gone) as client:
        got = await client.post("/flush_cache")
        assert got.status == 502
        assert f"1 of 2 workers failed: {gone}" in (await got.json())["error"]["message"]


async def test_what_one_worker_does_not_have_is_looked_for_at_the_others() -> None:
    a, b = FakeWorker("a"), FakeWorker("b")
    a.says(404)
    async with routing(a, b, max_retries=0) as client:
        assert [await (await client.get("/v1/responses/resp_1")).text() for _ in range(2)] == ["b", "b"]
        b.says(404)
        assert (await client.get("/v1/responses/resp_1")).status == 404
        a.says(400)
        b.answer = b.say_name
        for _ in range(2):
            got = await client.post("/v1/responses", json={"previous_response_id": "resp_1", "input": "And?"})
            assert await got.text() == "b"


async def test_files_batches_and_sessions_are_kept_by_the_first_worker() -> None:
    async with routing(*map(FakeWorker, "ab")) as client:
        for path in ("/v1/files", "/v1/files/file-1/content", "/v1/batches", "/open_session"):
            assert [await (await client.get(path)).text() for _ in range(2)] == ["a", "a"]
        assert await answers(client, 2, session_params={"id": "s"}) == ["a", "a"]


async def test_the_dashboard_shows_the_worker_that_is_asked_for_and_says_which_there_are() -> None:
    engines = FakeEngine(), FakeEngine()
    async with (
        serving(engines[0], served_model_name=["first"]) as first,
        serving(engines[1], served_model_name=["second"]) as second,
        routing(url_of(first), url_of(second)) as client,
    ):
        for query, name, worker in (
            ("", "first", first),
            (f"?worker={quote(url_of(second), safe='')}&span=3600", "second", second),
            ("?worker=", "first", first),
        ):
            got = await client.get(f"/dashboard/data{query}")
            assert json.loads(await got.read())["model"] == name
            assert got.headers["X-Radixloop-Worker"] == url_of(worker)
            assert got.headers["X-Radixloop-Workers"] == f"{url_of(first)} {url_of(second)}"
        unknown = await client.get("/dashboard/data?worker=http://x")
        assert unknown.status == 400 and "no worker is 'http://x'" in await unknown.text()


async def test_a_key_that_opens_no_dashboard_shows_no_workers() -> None:
    async with serving(FakeEngine(), admin_api_key="a") as worker, routing(url_of(worker)) as client:
        refused = await client.get("/dashboard/data")
        assert (refused.status, "X-Radixloop-Workers" in refused.headers) == (401, False)


# ---- the command ----


def test_a_picture_is_a_few_characters_of_what_decides_who_gets_a_request() -> None:
    def body(image: bytes, text: str) -> bytes:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()

    one, other = (random.Random(seed).randbytes(100_000) for seed in range(2))
    prompts = [prompt_of(body(image, text)) for image, text in ((one, "a"), (one, "b"), (other, "a"))]
    assert all(len(prompt) < 500 for prompt in prompts)
    shared = [
        next(i for i, (a, b) in enumerate(zip(prompts[0], prompt, strict=False)) if a != b) for prompt in prompts[1:]
    ]
    assert shared[0] > 300 > 150 > shared[1]
    assert prompt_of(body(one, "a")[:-1]) == b""


def test_a_wrong_option_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--worker-urls", "localhost"], "url must be one like http://host:30000, got 'localhost'"),
        (["--policy", "best"], "invalid choice"),
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--max-retries=-1"], "--max-retries must be at least 0, got -1"),
        (["--health-check-interval", "0"], "--health-check-interval must be above 0, got 0.0"),
        (["--wroker-urls", "x"], "did you mean --worker-urls?"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


async def test_the_process_routes_until_a_signal_and_needs_no_torch(free_port: int) -> None:
    code = "import sys, server.fleet.router as r; s = r.main(); assert 'torch' not in sys.modules; sys.exit(s)"
    worker = FakeWorker("a")
    async with listening(worker.app()) as url, aiohttp.ClientSession() as client:
        argv = ["-c", code, "--worker-urls", url, "--port", str(free_port)]
        process = await asyncio.create_subprocess_exec(sys.executable, *argv)
        try:
            while True:
                try:
                    data, headers = gzip.compress(json.dumps({"text": 1}).encode()), {"Content-Encoding": "gzip"}
                    address = f"http://127.0.0.1:{free_port}/generate"
                    async with client.post(address, data=data, headers=headers) as got:
                        assert await got.text() == "a"
                    assert worker.seen[-1][2] == b'{"text": 1}', "which the worker has unpacked"
                    health = f"http://127.0.0.1:{free_port}/health"
                    async with client.get(health, headers={"X-Long": "a" * 40_000}) as got:
                        assert got.status == 200, "a header may be as long as a server's"
                    reader, writer = await asyncio.open_connection("127.0.0.1", free_port)
                    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                    assert b"\r\n\r\n{" in await asyncio.wait_for(reader.read(), 60), "JSON, as a server's"
                    writer.close()
                    break
                except aiohttp.ClientConnectionError:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
            process.terminate()
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()

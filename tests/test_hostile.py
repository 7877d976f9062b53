"""What one client sends cannot hold the event loop, the memory or the answers of the others.

Every async test also runs under the guard of `conftest`: no callback may hold the loop for more than 100 ms.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import platform
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from bench.worst import AROUND_PROMPT
from engine.request import Request, SamplingParams
from engine.state import RequestState
from server.app import build_app
from server.config import ServerConfig
from server.http import bodies, connections, intake
from server.http.bodies import BODY_BUDGET
from server.http.connections import Connections
from server.http.intake import Acceptor
from server.http.malformed import AIOHTTP_LOGGER, shorten_malformed
from server.reading import protocol
from server.watch.heap import Heap, resident_bytes, trim_heap
from tests.client import Client
from tests.fake_engine import FakeEngine, serving

ROOT = Path(__file__).parent.parent


# ---- texts to parse ----


@pytest.mark.parametrize("mark", ["<tool_call>", '<tool_call>{"id": [', "<function="])
@pytest.mark.parametrize("parser", ["qwen25", "glm45", "qwen3_coder"])
async def test_a_long_text_of_marks_is_parsed_off_the_loop(client: Client, parser: str, mark: str) -> None:
    text = mark * (900_000 // len(mark))
    body = {"text": text, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_call_parser": parser}
    answer = await client.post("/parse_function_call", data=json.dumps(body), headers=JSON)
    assert answer.status == 200
    assert (await answer.json()) == {"normal_text": text, "calls": []}


JSON = {"Content-Type": "application/json"}


# ---- bodies ----


async def post(client: Client, path: str, body: bytes) -> tuple[int, Any]:
    answer = await client.post(path, data=body, headers=JSON)
    return answer.status, await answer.json()


def message_of(answer: Any) -> str:
    error = answer["error"]
    return str(error if isinstance(error, str) else error["message"])


PATHS = (
    "/generate", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/v1/embeddings", "/tokenize",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("values", "what"), [(b"{},", "objects and lists"), (b"[],", "objects"), (b"1,", "values")])
async def test_a_body_of_millions_of_values_is_a_413_before_they_are_made(
    client: Client, path: str, values: bytes, what: str
) -> None:
    status, answer = await post(client, path, b'{"model": "x", "unknown": [' + values * 2_500_000 + b"1]}")
    assert status == 413
    assert what in message_of(answer)


@pytest.mark.parametrize("path", sorted(AROUND_PROMPT.keys() - {"/tokenize"}))  # the engine here counts on the loop
async def test_a_long_text_is_not_walked_through_on_the_loop(client: Client, path: str) -> None:
    """A look at each character of a text, where lists may stand too, takes a second for every 16 MB."""
    head, tail = AROUND_PROMPT[path]
    head = head.replace(b'"demo"', b'"fake-model"')
    status, _ = await post(client, path, head + b'"' + b"a" * (4 << 20) + b'"' + tail + b"}")
    assert status in (200, 400)


async def test_a_body_that_others_leave_no_room_for_is_a_429_and_one_too_large_for_all_a_413(
    engine: FakeEngine,
) -> None:
    async with serving(engine, max_held_bytes=3_000_000) as client:
        budget = client.server.app[BODY_BUDGET]  # type: ignore[attr-defined]
        release = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b'{"text": "' + b" " * 1_000_000
            await release.wait()
            yield b'"}'

        begun = asyncio.create_task(client.post("/generate", data=slow(), headers=JSON))
        async with asyncio.timeout(60):
            while budget.num_bytes < 2_000_000:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        answer = await client.post("/v1/completions", data=b'{"prompt": "%b"}' % (b" " * 1_000_000), headers=JSON)
        assert answer.status == 429
        assert answer.headers["Retry-After"]
        assert (await post(client, "/generate", b'{"text": "Hi"}'))[0] == 200
        release.set()
        assert (await begun).status in (200, 400)
        assert (await post(client, "/generate", b'{"text": "%b"}' % (b" " * 2_000_000)))[0] == 413
        assert budget.num_bytes == 0


@pytest.fixture(scope="module")
def grown_body() -> bytes:
    """Return a compressed text of half a gigabyte."""
    compressor, spaces = zlib.compressobj(1, wbits=31), b" " * (1 << 20)
    pieces = [compressor.compress(b'{"text": "'), *(compressor.compress(spaces) for _ in range(512))]
    return b"".join([*pieces, compressor.flush()])


async def test_a_compressed_body_does_not_hold_the_loop_while_it_is_read_refused_and_passed_over(
    engine: FakeEngine, tmp_path: Path, grown_body: bytes
) -> None:
    """What is left of a refused body is read too: without a pause, until the connection's patience ends."""
    async with listening(engine, tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head_of("/generate", grown_body, "Content-Encoding: gzip", "Connection: close"))
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"--max-body-bytes" in answer


async def test_bodies_that_take_long_to_read_leave_the_loop_to_others_for_as_long(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, times = protocol.parse, list[tuple[float, float]]()

    def slow_parse(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        time.sleep(0.03)
        times.append((begun, time.perf_counter()))
        return parse(*arguments, **options)

    monkeypatch.setattr(protocol, "parse", slow_parse)
    body = orjson.dumps({"text": "Hi", "unknown": "x" * 300_000})
    answers = await asyncio.gather(*(post(client, "/generate", body) for _ in range(6)))
    assert [status for status, _ in answers] == [200] * 6
    assert len(times) == 6
    assert min(begun - ended for (_, ended), (begun, _) in itertools.pairwise(times)) > 0.02


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "Hi"}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/responses", {"input": "Hi", "background": True}),
        ("/api/chat", {"model": "fake-model", "messages": [{"role": "user", "content": "Hi"}]}),
        ("/api/generate", {"model": "fake-model", "prompt": "Hi"}),
    ],
)
@pytest.mark.max_callback_ms(5000)  # of looking at all objects there are
async def test_what_was_read_is_not_held_while_the_answer_is_generated(
    engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    """Neither the bytes, nor what is not known, nor the text of the prompt."""
    engine.is_manual = True
    async with serving(engine) as client:
        budget = client.server.app[BODY_BUDGET]  # type: ignore[attr-defined]
        text = json.dumps({"model": "fake-model", **body})[:-1] + ', "unknown": ["' + "x" * 100_000 + '"]}'
        asking = asyncio.create_task(client.post(path, data=text, headers=JSON))
        await engine.until(lambda: bool(engine.live))
        async with asyncio.timeout(60):
            while budget.num_bytes:  # noqa: ASYNC110 - it falls a pass of the loop after the engine has the request
                await asyncio.sleep(0)
        assert not any(
            type(value) is str and len(value) == 100_000
            for found in gc.get_objects()
            if type(found) is list and len(found) == 1
            for value in found
        )
        asking.cancel()


@pytest.mark.parametrize("path", PATHS[1:5])
@pytest.mark.max_callback_ms(150)  # 3 MB are parsed in one go
async def test_more_messages_than_can_ever_fit_are_refused_at_once(client: Client, path: str) -> None:
    messages = b'{"role":"user","content":"a"},' * 100_000
    limit, name = (b"max_output_tokens", b"input") if path == "/v1/responses" else (b"max_tokens", b"messages")
    status, answer = await post(
        client, path, b'{"model": "fake-model", "%b": 5, "%b": [%b]}' % (limit, name, messages[:-1])
    )
    assert status == 400
    assert "100000" in message_of(answer)


@pytest.mark.parametrize("path", PATHS[1:5])
async def test_thousands_of_messages_do_not_hold_the_loop(client: Client, path: str) -> None:
    messages = b'{"role":"user","content":"a"},' * 10_000
    name = b"input" if path == "/v1/responses" else b"messages"
    status, _ = await post(
        client, path, b'{"model": "fake-model", "max_tokens": 5, "%b": [%b]}' % (name, messages[:-1])
    )
    assert status in (200, 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": ["a"] * 16_384, "sampling_params": {"max_new_tokens": 0}}),
        ("/v1/completions", {"prompt": ["a"] * 16_384, "max_tokens": 0}),
        ("/v1/completions", {"prompt": [[1]] * 16_384, "max_tokens": 0}),
        ("/tokenize", {"prompt": ["a"] * 16_384}),
        ("/generate", {"input_ids": [1] * 2_000_000}),
        ("/v1/completions", {"prompt": [1] * 2_000_000}),
        ("/detokenize", {"tokens": [65] * 2_000_000}),
    ],
    ids=range(7),
)
@pytest.mark.max_callback_ms(150)  # 4 MB of ids are parsed, and checked, in one go
async def test_the_longest_lists_do_not_hold_the_loop(
    engine: FakeEngine, client: Client, path: str, body: dict[str, Any]
) -> None:
    engine.max_running_requests = 1024
    status, _ = await post(client, path, orjson.dumps(body))
    assert status in (200, 400, 429)


LISTS = [
    ("/generate", "text", "a"), ("/generate", "input_ids", [1]), ("/v1/completions", "prompt", "a"),
    ("/v1/embeddings", "input", "a"), ("/encode", "text", "a"), ("/v1/rerank", "documents", "a"),
    ("/api/embed", "input", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "one"), LISTS, ids=range(len(LISTS)))
@pytest.mark.parametrize(("num_rows", "limit"), [(48, 2048), (256, 4096)])
async def test_a_list_of_more_prompts_than_the_engine_answers_in_sixteen_rounds_is_a_400_that_names_the_limit(
    engine: FakeEngine, client: Client, num_rows: int, limit: int, path: str, name: str, one: Any
) -> None:
    engine.max_running_requests = num_rows
    body = {"model": "fake-model", "query": "a", name: [one] * (limit + 1)}
    status, answer = await post(client, path, orjson.dumps(body))
    assert status == 400
    assert name in message_of(answer)
    assert f"the limit is {limit}" in message_of(answer)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/generate", "input_ids"), ("/v1/completions", "prompt"), ("/v1/embeddings", "input"), ("/encode", "input_ids")],
)
@pytest.mark.parametrize("is_list", [False, True])
async def test_more_ids_than_a_context_holds_are_refused_without_a_look_at_each(
    client: Client, path: str, name: str, is_list: bool
) -> None:
    ids = [10**6] * 300  # none of them is in the vocabulary
    status, answer = await post(client, path, orjson.dumps({name: [ids, ids] if is_list else ids}))
    assert status == 400
    assert "300" in message_of(answer)
    assert "vocabulary" not in message_of(answer)


async def test_n_answers_to_each_of_many_prompts_are_as_bounded_as_the_list(client: Client) -> None:
    status, answer = await post(client, "/v1/completions", orjson.dumps({"prompt": ["a"] * 1000, "n": 3}))
    assert (status, answer["error"]["param"]) == (400, "n")
    assert "between 1 and 2" in message_of(answer)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/embeddings", "/tokenize", "/api/embed"])
async def test_texts_that_each_take_a_millisecond_do_not_hold_the_loop_together(
    engine: FakeEngine, client: Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, num_a_pass = engine.tokenizer.encode, [0]
    monkeypatch.setattr(intake, "time", SimpleNamespace(perf_counter=lambda: sum(num_a_pass) * 0.0015))

    def counted_encode(text: str, *arguments: Any, **options: Any) -> list[int]:
        num_a_pass[-1] += 1
        return encode(text, *arguments, **options)

    async def start_passes() -> None:
        while True:
            num_a_pass.append(0)
            await asyncio.sleep(0)

    engine.tokenizer.encode = counted_encode  # type: ignore[method-assign]
    name = {"/generate": "text", "/v1/completions": "prompt", "/tokenize": "prompt"}.get(path, "input")
    passing = asyncio.create_task(start_passes())
    status, _ = await post(client, path, orjson.dumps({"model": "fake-model", name: ["a"] * 63}))
    passing.cancel()
    assert status == 200
    assert sum(num_a_pass) == 63 and max(num_a_pass) <= 16


# ---- memory that malloc keeps ----


class Memory:
    """What the system sees of a process, in megabytes, and how often its heap was trimmed to `kept_mb`."""

    def __init__(self) -> None:
        self.resident_mb, self.kept_mb, self.num_trims = 1000, 1000, 0

    def trim(self) -> None:
        self.resident_mb, self.num_trims = self.kept_mb, self.num_trims + 1

    def resident(self) -> int:
        return self.resident_mb << 20


async def test_memory_that_a_load_has_left_is_given_back_once_nothing_runs(engine: FakeEngine) -> None:
    memory = Memory()
    heap = Heap(engine, memory.trim, memory.resident)
    await heap.look()
    assert memory.num_trims == 0
    engine.is_manual, memory.resident_mb = True, 1300
    state = RequestState(Request("a", [1], SamplingParams()))
    engine.submit(state)
    await heap.look()
    assert memory.num_trims == 0  # it would hold up the step that runs
    engine.abort("a")
    memory.kept_mb = 1100
    await heap.look()
    assert memory.num_trims == 1
    await heap.look()
    assert memory.num_trims == 1  # what is left is in use
    memory.resident_mb = 1110
    await heap.look()
    assert memory.num_trims == 1  # too little to look for


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_a_trim_gives_back_what_lies_between_pieces_that_are_in_use() -> None:
    pieces = [
        i.to_bytes(1) * 100_000 for i in range(250) for _ in range(8)
    ]  # each too small to be a mapping of its own
    kept = pieces[::2]
    full = resident_bytes()
    pieces.clear()
    assert len(kept) == 1000
    trim_heap()
    assert full - resident_bytes() > 20 << 20


THREADS_MEMORY = """
import threading
from server.watch.heap import resident_bytes, trim_heap, use_one_arena
use_one_arena()
bytearray(30 << 20)  # freed: from now on malloc trims by itself beyond 60 MB only
before = resident_bytes()
def read():
    pieces = [b"a" * 100_000 for _ in range(400)]
thread = threading.Thread(target=read)
thread.start()
thread.join()
trim_heap()
print(resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no arenas of glibc's kind")
def test_a_trim_gives_back_what_threads_took() -> None:
    run = subprocess.run([sys.executable, "-c", THREADS_MEMORY], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert int(run.stdout) < 20 << 20


# ---- files ----


async def upload(client: Client, content: bytes) -> str:
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", content, filename="lines.jsonl")
    answer = await client.post("/v1/files", data=form)
    assert answer.status == 200, await answer.text()
    return str((await answer.json())["id"])


async def failure_of_batch(client: Client, content: bytes) -> list[Any]:
    body = {"input_file_id": await upload(client, content), "endpoint": "/v1/completions"}
    batch = await (await client.post("/v1/batches", json=body)).json()
    async with asyncio.timeout(60):
        while batch["status"] == "validating":
            await asyncio.sleep(0.02)
            batch = await (await client.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["status"] == "failed"
    return list(batch["errors"]["data"])


def batch_line(custom_id: str, **body: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", **body}}
    return json.dumps(line).encode() + b"\n"


async def test_a_batchs_line_is_no_longer_than_a_body_and_is_not_read_to_its_end(engine: FakeEngine) -> None:
    async with serving(engine, max_body_bytes=1000) as client:
        content = batch_line("a") + batch_line("b", unknown="x" * 100_000) + batch_line("c", unknown="x" * 800)
        (error,) = await failure_of_batch(client, content + batch_line("d"))
        assert error["line"] == 2
        assert "1000 bytes" in error["message"]


async def test_a_batchs_line_of_millions_of_values_is_refused(client: Client) -> None:
    text = batch_line("a", unknown=[]).replace(b"[]", b"[" + b"{}," * 300_000 + b"1]")
    (error,) = await failure_of_batch(client, text)
    assert error["line"] == 1
    assert "the line has more than" in error["message"]


async def test_lines_that_are_large_together_are_answered_one_after_the_other(engine: FakeEngine) -> None:
    async with serving(engine, max_held_bytes=400_000) as client:
        lines = b"".join(batch_line(f"{i}", unknown="x" * 30_000) for i in range(4))
        body = {"input_file_id": await upload(client, lines), "endpoint": "/v1/completions"}
        batch = await (await client.post("/v1/batches", json=body)).json()
        async with asyncio.timeout(60):
            while batch["status"] != "completed":
                await asyncio.sleep(0.05)
                batch = await (await client.get(f"/v1/batches/{batch['id']}")).json()
        assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}


@pytest.mark.parametrize("name", ["purpose", "file", "other"])
async def test_a_form_has_few_parts(client: Client, name: str) -> None:
    part = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\nbatch\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await client.post("/v1/files", data=part * 50_000 + b"--b--\r\n", headers=headers)
    assert answer.status == 400
    assert (await answer.json())["error"]["param"] == name


@pytest.mark.parametrize("filler", [b"\r\n", b"\n", b"x\r\n", b"-" * 1000])
async def test_what_stands_before_a_forms_parts_is_short(client: Client, filler: bytes) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await client.post("/v1/files", data=filler * (2_000_000 // len(filler)) + part, headers=headers)
    assert answer.status == 400


# ---- connections ----


@asynccontextmanager
async def accepting(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[tuple[int, Connections]]:
    """Yield the port of a server, and its connections as `python -m server` makes them."""
    runner = web.AppRunner(
        build_app(engine, ServerConfig(model_path="fake-model", file_storage_path=str(tmp_path))),
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    assert runner.server is not None
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        async with Connections(runner.server) as made:
            with Acceptor(listener, made, made.make_room):
                yield listener.getsockname()[1], made
            await runner.cleanup()


@asynccontextmanager
async def listening(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[int]:
    """Yield the port of such a server."""
    async with accepting(engine, tmp_path) as (port, _):
        yield port


def head_of(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


async def answer_to(port: int, request: bytes) -> tuple[int, str, Any]:
    """Return the status, the content type and the JSON of the answer to raw bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(60):
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
    writer.close()
    return int(first.split()[1]), headers["content-type"], json.loads(body)


@pytest.mark.parametrize("num_requests", [2, 50, 500])
async def test_a_client_that_pipelines_and_goes_has_one_request_at_work_and_then_none(
    engine: FakeEngine, tmp_path: Path, num_requests: int
) -> None:
    engine.is_manual = True
    async with listening(engine, tmp_path) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head_of("/generate", b'{"text": "Hi"}') * num_requests)
        await engine.until(lambda: len(engine.live) == 1)
        await asyncio.sleep(0.2)
        assert len(engine.live) == 1
        writer.close()
        await engine.until(lambda: not engine.live)
        await asyncio.sleep(0.1)
        assert len(engine.requests) == 1


async def test_a_client_that_goes_while_its_next_body_waits_ends_what_is_at_work(
    engine: FakeEngine, tmp_path: Path
) -> None:
    engine.is_manual = True
    async with listening(engine, tmp_path) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head_of("/generate", b'{"text": "Hi"}') + head_of("/generate", b" " * 1_000_000))
        await engine.until(lambda: len(engine.live) == 1)
        writer.close()
        await engine.until(lambda: not engine.live)


@pytest.mark.parametrize("path", ["/generate", "/v1/files"])
async def test_a_body_of_which_no_more_comes_is_a_408_and_leaves_its_room_to_others(
    engine: FakeEngine, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "SILENCE_S", 0.1)
    head = head_of(path, b"{" * 1000)[:-500]
    if path == "/v1/files":
        head = head.replace(b"application/json", b"multipart/form-data; boundary=x")
    async with listening(engine, tmp_path) as port:
        status, _, answer = await answer_to(port, head)
        assert status == 408
        assert "did not come" in answer["error"]["message"]


async def test_a_connection_on_which_no_request_comes_is_closed(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SILENCE_S", 0.1)
    monkeypatch.setattr(connections, "WATCH_INTERVAL_S", 0.05)
    async with listening(engine, tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /generate HTTP/1.1\r\nHost: loc")
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_room_for_a_connection_is_that_of_those_idle_longest(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CLOSED", 2)
    engine.is_manual = True
    async with accepting(engine, tmp_path) as (port, made):

        def num_idle() -> int:
            return sum(one.idle_since is not None for one in made.all())

        busy, *idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        busy[1].write(head_of("/generate", b'{"text": "Hi"}'))
        await engine.until(lambda: len(engine.live) == 1)
        for reader, writer in idle:
            writer.write(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            async with asyncio.timeout(60):
                while num_idle() < 3:  # noqa: ASYNC110 - until it is idle again, which no event says
                    await asyncio.sleep(0.01)
        made.make_room()
        for reader, _ in idle[:2]:
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 60)
        assert (num_idle(), len(engine.live)) == (1, 1)
        for _, writer in (busy, *idle):
            writer.close()


async def test_a_header_may_have_64_kib(engine: FakeEngine, tmp_path: Path) -> None:
    async with listening(engine, tmp_path) as port:
        status, _, answer = await answer_to(port, head_of("/generate", b'{"text": "Hi"}', f"Cookie: {'x' * 60_000}"))
        assert (status, answer["text"]) == (200, "Hello, world")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head_of("/v1/messages", b"{}", f"Cookie: {'x' * 70_000}"), 400),
        (head_of("/v1/messages", b"{}", "Content-Encoding: br"), 415),
        (b"POST /v1/messages HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"no request at all\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
    ids=["header", "br", "length", "words", "tls"],
)
async def test_what_is_no_http_is_answered_in_json_and_is_no_error_in_the_log(
    engine: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request_: bytes,
    status: int,
) -> None:
    monkeypatch.setattr(logging.getLogger(AIOHTTP_LOGGER), "filters", [])
    shorten_malformed()
    caplog.set_level(logging.INFO)
    async with listening(engine, tmp_path) as port:
        got, kind, answer = await answer_to(port, request_)
    assert (got, kind.split(";")[0]) == (status, "application/json")
    assert answer["type"] == "error"
    assert answer["error"]["message"]
    assert status != 415 or "Content-Encoding" in answer["error"]["message"]
    assert not [record for record in caplog.records if record.levelno > logging.WARNING or record.exc_info]
    assert sum(record.levelno > logging.INFO for record in caplog.records) <= 1


# ---- web pages ----

ACTIONS = (
    ("POST", "/generate"), ("POST", "/v1/chat/completions"), ("POST", "/pause_generation"), ("POST", "/api/chat"),
    ("POST", "/release_memory_occupation"), ("POST", "/flush_cache"), ("GET", "/flush_cache"),
    ("POST", "/start_profile"), ("GET", "/start_profile"), ("GET", "/health_generate"), ("POST", "/v1/files"),
    ("DELETE", "/v1/files/file-x"), ("POST", "/v1/batches/batch_x/cancel"), ("POST", "/close_session"),
)  # fmt: skip
FOREIGN = (
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://["},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize(("method", "path"), ACTIONS)
async def test_a_page_of_another_site_can_do_nothing(
    client: Client, engine: FakeEngine, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = await client.request(method, path, headers=headers)
    assert answer.status == 403
    assert "--allowed-origins" in message_of(await answer.json())
    assert not engine.requests


async def test_every_route_that_is_not_a_plain_get_refuses_other_sites(client: Client) -> None:
    routes = {
        (route.method, route.resource.canonical.replace("{", "x").replace("}", "x"))
        for route in client.server.app.router.routes()  # type: ignore[attr-defined]
        if route.resource is not None and route.method not in ("GET", "HEAD")
    }
    assert len(routes) > 40
    for method, path in routes:
        answer = await client.request(method, path, headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status == 403, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://localhost:{port}", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:{port}"},
        {"Origin": "http://[::1]:{port}"},
    ],
    ids=str,
)
async def test_our_own_pages_and_programs_may_do_everything(client: Client, headers: dict[str, str]) -> None:
    headers = {name: value.replace("{port}", str(client.port)) for name, value in headers.items()}
    answer = await client.post("/generate", json={"text": "Hi"}, headers=headers)
    assert answer.status == 200


async def test_a_link_to_the_dashboard_works_from_anywhere(client: Client) -> None:
    assert (await client.get("/dashboard", headers={"Sec-Fetch-Site": "cross-site"})).status == 200


async def test_a_preflight_is_a_204_that_allows_nothing_unless_the_origin_is_listed(engine: FakeEngine) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    async with serving(engine, api_key="secret", allowed_origins=["https://chat.example"]) as client:
        for origin in ("https://evil.example", "null", "http://chat.example"):
            answer = await client.options("/v1/chat/completions", headers={"Origin": origin, **asked})
            assert answer.status == 204
            assert not [name for name in answer.headers if name.startswith("Access-Control")]
        own = {"Origin": "https://chat.example"}
        answer = await client.options("/v1/chat/completions", headers={**own, **asked})
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert answer.headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_listed_origins_page_may_read_answers_streams_and_errors(engine: FakeEngine, stream: bool) -> None:
    headers = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    async with serving(engine, allowed_origins=["https://chat.example"]) as client:
        for body, status in (({"text": "Hi", "stream": stream}, 200), ({}, 400)):
            answer = await client.post("/generate", json=body, headers=headers)
            assert answer.status == status
            assert answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert "Access-Control-Allow-Origin" not in (await client.get("/health")).headers


async def test_a_server_on_loopback_answers_to_its_own_names_only(engine: FakeEngine) -> None:
    async with serving(engine, allowed_hosts=["llm.example"]) as client:
        for name, status in (
            ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403),
            ("localhost", 200), ("LOCALHOST:30000", 200), ("127.0.0.1:30000", 200), ("[::1]:30000", 200),
            ("192.168.1.7", 200), ("host.docker.internal:30000", 200), ("llm.example", 200), ("app.localhost", 200),
        ):  # fmt: skip
            for path in ("/get_model_info", "/health", "/dashboard"):
                assert (await client.get(path, headers={"Host": name})).status == status, (name, path)
    async with serving(engine, host="0.0.0.0") as client:
        assert (await client.get("/health", headers={"Host": "any.example"})).status == 200

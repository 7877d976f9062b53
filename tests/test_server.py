"""The native API, streaming, keys, errors and the command line."""

import asyncio
import contextlib
import functools
import gc
import json
import os
import signal
import socket
import sys
import threading
import types
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from engine.errors import ModelError
from engine.request import Request
from engine.state import FinishReason, RequestState
from engine.step.model_runner import Step
from engine.text.tokenizer import Tokenizer
from server.__main__ import main
from server.app import build_app
from server.command_line import parse_args
from server.config import ServerConfig
from server.http.sse import HIGH_WATER_BYTES, EventStream
from server.parsers.tool_calls import json_of
from tests.client import Client, events_of
from tests.fake_engine import FakeEngine, serving
from tests.server_processes import reserved_port, wait_until
from tests.test_engine import running_engine


async def generate(client: Client, **body: Any) -> Any:
    response = await client.post("/generate", json=body)
    assert response.status == 200, await response.text()
    return await response.json()


async def stream(client: Client, path: str = "/generate", **body: Any) -> list[Any]:
    """Return the events of a streamed answer, which must end in [DONE]."""
    response = await client.post(path, json={**body, "stream": True})
    assert response.status == 200, await response.text()
    assert response.content_type == "text/event-stream"
    *events, done = events_of(await response.read())
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


# ---- /generate ----


async def test_a_single_prompt_gets_a_single_answer(client: Client) -> None:
    answer = await generate(client, text="Hi", rid="mine")
    assert answer["text"] == "Hello, world"
    assert answer["output_ids"] == list(b"Hello, world")
    meta = answer["meta_info"]
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == ("mine", 2, 12, 2)
    assert meta["finish_reason"] == {"type": "stop", "matched": 257}


async def test_a_list_gets_a_list_and_n_multiplies_it_prompt_by_prompt(client: Client, engine: FakeEngine) -> None:
    answers = await generate(client, text=["a", "bc"], sampling_params={"n": 2, "max_new_tokens": 3})
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [1, 1, 2, 2]
    assert {answer["text"] for answer in answers} == {"Hel"}
    assert answers[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert len({request.rid for request in engine.requests}) == 4


async def test_n_answers_are_sampled_with_different_seeds_and_own_their_parameters(
    client: Client, engine: FakeEngine
) -> None:
    await generate(client, text=["a", "b"], sampling_params={"n": 2, "sampling_seed": 7})
    assert [request.sampling_params.sampling_seed for request in engine.requests] == [7, 8, 7, 8]
    assert len({id(request.sampling_params) for request in engine.requests}) == 4


async def test_lists_give_options_prompt_by_prompt(client: Client, engine: FakeEngine) -> None:
    answers = await generate(
        client,
        input_ids=[[1, 2], [3]],
        rid=["x", "y"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        return_logprob=[False, True],
        token_ids_logprob=[[], [5]],
    )
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "y"]
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 2]
    assert "output_token_logprobs" not in answers[0]["meta_info"]
    assert answers[1]["meta_info"]["output_token_ids_logprobs"] == [[[-3.0, 5, None]]] * 2


async def test_streamed_text_is_cumulative(client: Client) -> None:
    events = await stream(client, text="Hi", rid="r")
    texts = [event["text"] for event in events]
    assert texts == ["Hello, world"[: i + 1] for i in range(12)] + ["Hello, world"]
    assert events[4]["output_ids"] == list(b"Hello")
    assert events[4]["meta_info"] == {
        "id": "r", "finish_reason": None, "prompt_tokens": 2, "cached_tokens": 2, "completion_tokens": 5,
    }  # fmt: skip
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 257}
    assert "index" not in events[0]


async def test_streamed_text_is_disjoint_with_stream_output(engine: FakeEngine) -> None:
    async with serving(engine, stream_output=True) as client:
        events = await stream(client, text="Hi")
    assert "".join(event["text"] for event in events) == "Hello, world"
    assert [event["output_ids"] for event in events[:2]] == [[72], [101]]
    assert events[-1]["meta_info"]["completion_tokens"] == 12


async def test_text_that_needs_escaping_survives_the_stream(engine: FakeEngine) -> None:
    engine.is_manual = True
    pieces = ['"quoted" \\ ', "tab\t\n", "\x00\x1f", "日本語🙂", "</script>\u2028"]
    async with serving(engine) as client:
        task = asyncio.create_task(stream(client, text="Hi"))
        await engine.until(lambda: bool(engine.live))
        state = engine.states[0]
        for piece in pieces:
            engine.emit(state, piece)
            await asyncio.sleep(0)
        engine.finish(state, FinishReason("length"))
        events = await task
    assert events[-1]["text"] == "".join(pieces)


async def test_a_streamed_batch_tells_its_answers_apart_by_index(client: Client) -> None:
    events = await stream(client, text=["a", "b"], sampling_params={"max_new_tokens": 4})
    last = {event["index"]: event for event in events}
    assert [last[i]["text"] for i in (0, 1)] == ["Hell", "Hell"]
    assert last[0]["meta_info"]["id"] != last[1]["meta_info"]["id"]


async def test_logprobs_are_triples_of_value_id_and_text(client: Client) -> None:
    answer = await generate(
        client,
        text="Hi",
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
        sampling_params={"max_new_tokens": 1},
    )
    meta = answer["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 72, "H"], [-0.5, 105, "i"]]
    assert meta["output_token_logprobs"] == [[-0.5, 72, "H"]]
    assert meta["input_top_logprobs"][0] is None
    assert meta["output_top_logprobs"] == [[[-0.5, 72, "H"], [-1.0, 73, "I"]]]


async def test_streamed_logprobs_are_cumulative_too(client: Client) -> None:
    events = await stream(client, text="Hi", return_logprob=True, sampling_params={"max_new_tokens": 3})
    assert [len(event["meta_info"]["output_token_logprobs"]) for event in events] == [1, 2, 3, 3]


async def test_no_tokens_may_be_asked_for(client: Client) -> None:
    answer = await generate(client, text="Hi", sampling_params={"max_new_tokens": 0})
    assert answer["text"] == ""
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


# ---- what clients do wrong ----


BAD_GENERATE: list[tuple[Any, str]] = [
    ({}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"text": ""}, "text"),
    ({"text": []}, "text"),
    ({"text": 5}, "text"),
    ({"text": ["a", 5]}, "text[1]"),
    ({"text": ["a", ""]}, "text[1]"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": ["a"]}, "input_ids"),
    ({"input_ids": [1, 2.5]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"input_ids": [260]}, "input_ids"),
    ({"input_ids": [10**30]}, "input_ids"),
    ({"input_ids": [[1], []]}, "input_ids[1]"),
    ({"text": "a" * 300}, "text"),
    ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 10**12}}, "text"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 1.5}}, "max_new_tokens"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
    ({"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature"),
    ({"text": "a", "sampling_params": {"top_p": -0.1}}, "top_p"),
    ({"text": "a", "sampling_params": {"top_k": -2}}, "top_k"),
    ({"text": "a", "sampling_params": {"repetition_penalty": 1e-40}}, "repetition_penalty"),
    ({"text": "a", "sampling_params": {"logit_bias": {"5": 1e38}}}, "logit_bias"),
    ({"text": "a", "sampling_params": {"n": 0}}, "n"),
    ({"text": "a", "sampling_params": {"n": 10**9}}, "n"),
    ({"text": "a", "sampling_params": {"stop_token_ids": [1 << 70]}}, "stop_token_ids"),
    ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params"),
    ({"text": "a", "sampling_params": [1]}, "sampling_params[0]"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": "a", "stream": "yes"}, "stream"),
    ({"text": "a", "rid": 5}, "rid"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"text": "a", "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"text": "a", "top_logprobs_num": 10**6}, "top_logprobs_num"),
    ({"text": "a", "logprob_start_len": "0"}, "logprob_start_len"),
    ({"text": "a", "token_ids_logprob": ["x"]}, "token_ids_logprob"),
    ({"text": "a", "token_ids_logprob": [1] * 1025}, "token_ids_logprob"),
    ({"text": "a", "image_data": "cat.png"}, "image_data"),
    ({"text": "a", "lora_path": "adapter"}, "lora_path"),
]


@pytest.mark.parametrize(("body", "field"), BAD_GENERATE)
async def test_a_bad_generate_body_is_a_400_that_names_the_field(client: Client, body: Any, field: str) -> None:
    response = await client.post("/generate", json=body)
    error = (await response.json())["error"]
    assert (response.status, error["code"], error["field"]) == (400, 400, field)
    known = (field.partition("[")[0], "prompt has", "unknown sampling parameter: max_tokens")
    assert any(part in error["message"] for part in known)
    assert len(error["message"]) < 300
    assert (await generate(client, text="Hi"))["text"] == "Hello, world"


NOT_UTF_8 = b'{"text": "\xff"}'
RAW_BODIES = [
    b"",
    b"{",
    b'{"text": "a"',
    b"[]",
    b'"text"',
    b"null",
    b'{"text": NaN}',
    b'{"text": "a", "sampling_params": {"temperature": Infinity}}',
    NOT_UTF_8,
    b"[" * 100_000,
]


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/completions", "/v1/chat/completions", "/abort_request", "/tokenize"]
)
@pytest.mark.parametrize("body", RAW_BODIES, ids=range(len(RAW_BODIES)))
async def test_a_body_that_is_not_a_json_object_is_a_400(client: Client, path: str, body: bytes) -> None:
    response = await client.post(path, data=body, headers={"Content-Type": "application/json"})
    error = (await response.json())["error"]
    assert response.status == 400
    is_read = body == NOT_UTF_8 and path != "/generate"  # the field is passed over: the message is about another
    assert is_read or "JSON" in error["message"]
    assert ("type" in error) == path.startswith("/v1/")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", '{"text": "a", "rid": %s}'),
        ("/generate", '{"text": "a", "sampling_params": {"json_schema": {"const": %s}}}'),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": %s}]}'),
        ("/v1/embeddings", '{"input": %s}'),
        ("/v1/messages", '{"max_tokens": 1, "messages": [{"role": "assistant", "content": [%s]}]}'),
        ("/v1/responses", '{"input": "a", "reasoning": {"effort": null, "more": %s}}'),
        ("/v1/batches", '{"endpoint": "/v1/completions", "metadata": {"a": %s}}'),
        ("/api/chat", '{"messages": [{"role": "user", "content": "a"}], "format": {"const": %s}}'),
    ],
)
@pytest.mark.parametrize("depth", [195, 260, 1010])
async def test_no_depth_of_a_body_is_too_much_for_its_answer(client: Client, path: str, body: str, depth: int) -> None:
    deep = (body % ("[" * depth + "]" * depth)).encode()
    response = await client.post(path, data=deep, headers={"Content-Type": "application/json"})
    assert response.status < 500
    if depth > 200:
        assert response.status == 400
        text, name = await response.text(), body.rpartition('"')[0].rpartition('"')[2]
        assert "more than 200 objects or lists" in text or (name in text and " must be " in text)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/files"])
async def test_a_body_that_is_not_compressed_as_it_says_is_a_400(client: Client, path: str) -> None:
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
    response = await client.post(path, data=b'{"text": "a"}', headers=headers)
    assert response.status == 400
    assert "Content-Encoding" in await response.text()


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias", "regex", "temperature", "choice"])
async def test_an_error_quotes_little_of_a_long_value(client: Client, name: str) -> None:
    body = {"text": "a", "sampling_params": {name: [7] * 100_000 + ["x", None]}}
    response = await client.post("/generate", json=body)
    assert response.status == 400
    assert len(await response.read()) < 1000


STOPS_THAT_COST_TOO_MUCH = [
    {"stop": ["a" * 5000]},
    {"stop": [f"stop {i}" for i in range(1000)]},
    {"stop_regex": "a" * 1025},
    {"stop_regex": [f"a{i}" for i in range(400)]},
    {"stop_regex": "a{100000}"},
    {"stop_regex": "(?:(?:a{100}){100}){100}"},
    {"stop_regex": "(?x)a{1 0 0 0 0 0}"},
    {"stop_regex": "(?s)(?ix:a{#\n100000})"},
    {"stop_regex": "a{99999999999}"},
    {"stop_regex": "(" * 490 + ")" * 490},
]


@pytest.mark.parametrize("stops", STOPS_THAT_COST_TOO_MUCH, ids=range(len(STOPS_THAT_COST_TOO_MUCH)))
async def test_stops_that_would_take_the_loop_or_the_memory_are_refused(client: Client, stops: dict[str, Any]) -> None:
    response = await client.post("/generate", json={"text": "a", "sampling_params": stops})
    assert response.status == 400
    assert (await response.json())["error"]["field"] in stops


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        r".{1000}",
        r"(?i)f\(?x",
        r"(?:\d{3}){2}",
        "a{,9999}",
    ],
)
async def test_usual_repetitions_may_stop_an_answer(client: Client, pattern: str) -> None:
    assert (await generate(client, text="Hi", sampling_params={"stop_regex": pattern}))["text"] == "Hello, world"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": ["a"] * 400, "sampling_params": {"max_new_tokens": 0}}),
        ("/v1/completions", {"prompt": ["a"] * 8, "n": 50, "max_tokens": 0}),
        ("/tokenize", {"prompt": ["a"] * 400}),
        ("/detokenize", {"tokens": [[65]] * 400}),
        ("/encode", {"text": ["a"] * 400}),
        ("/score", {"text_1": ["a"] * 200, "text_2": ["b"] * 200}),
    ],
)
async def test_a_long_list_is_taken_a_part_a_turn(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    turn, counts = 0, Counter[tuple[str, int]]()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            counts[name, turn] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    counted(engine, "encode")
    counted(engine, "submit")
    counted(engine.tokenizer, "decode")
    counting = asyncio.create_task(count_turns())
    response = await client.post(path, json=body)
    counting.cancel()
    assert response.status == 200
    assert counts.total() >= 400
    assert max(counts.values()) <= 128


async def test_a_form_is_refused_because_any_web_page_can_send_one(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = await client.post("/generate", data=b'{"text": "a"}', headers={"Content-Type": kind})
        assert response.status == 400
        assert "application/json" in (await response.json())["error"]["message"]


@pytest.mark.max_callback_ms(500)  # the client writes it in one go
async def test_a_body_over_the_limit_is_a_413_and_the_next_request_is_served(client: Client) -> None:
    body = b'{"text": "' + b"a" * (32 << 20) + b'"}'
    response = await client.post("/generate", data=body, headers={"Content-Type": "application/json"})
    assert response.status == 413
    assert "33554432" in (await response.json())["error"]["message"]
    assert (await generate(client, text="Hi"))["text"] == "Hello, world"


async def test_a_chunked_body_over_the_limit_is_a_413_too(engine: FakeEngine) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1000

    async with serving(engine, max_body_bytes=10_000) as client:
        response = await client.post("/v1/completions", data=chunks(), headers={"Content-Type": "application/json"})
        assert response.status == 413
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_a_truncated_body_disturbs_nobody(client: Client, engine: FakeEngine) -> None:
    _, writer = await asyncio.open_connection(client.host, client.port)
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    writer.write(head + b'{"text": "a"')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await generate(client, text="Hi"))["text"] == "Hello, world"
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/generate"), ("DELETE", "/v1/completions"), ("GET", "/v1/chat/completions")]
)
async def test_a_wrong_method_is_a_405_that_says_the_right_one(client: Client, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status == 405
    assert "POST" in response.headers["Allow"]
    assert "POST" in (await response.json())["error"]["message"]


async def test_an_unknown_route_is_a_404_in_json(client: Client) -> None:
    response = await client.get("/nope")
    assert response.status == 404
    assert "/nope" in (await response.json())["error"]["message"]


async def test_a_full_queue_is_a_429_with_retry_after_and_takes_back_what_it_had_accepted(engine: FakeEngine) -> None:
    engine.is_manual, engine.max_queued = True, 2
    async with serving(engine) as client:
        response = await client.post("/generate", json={"text": ["a", "b", "c"], "rid": "many"})
        assert response.status == 429
        assert response.headers["Retry-After"] == "2"
    assert engine.aborted == ["many-0", "many-1"]


async def test_a_rid_in_use_is_refused(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        first = asyncio.create_task(client.post("/generate", json={"text": "a", "rid": "one"}))
        await engine.until(lambda: "one" in engine.live)
        second = await client.post("/generate", json={"text": "a", "rid": "one"})
        assert second.status == 400
        assert "'one'" in (await second.json())["error"]["message"]
        engine.finish(engine.live["one"], FinishReason("length"))
        assert (await first).status == 200


async def test_a_rid_whose_request_has_ended_may_be_used_again_beside_the_rest_of_its_list(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        first = asyncio.create_task(generate(client, text=["a", "b"], rid=["x", "y"]))
        await engine.until(lambda: len(engine.live) == 2)
        engine.finish(engine.live["x"], FinishReason("length"))
        second = asyncio.create_task(generate(client, text="c", rid="x"))
        await engine.until(lambda: "x" in engine.live)
        engine.finish(engine.live["y"], FinishReason("length"))
        assert [answer["meta_info"]["id"] for answer in await first] == ["x", "y"]
        engine.finish(engine.live["x"], FinishReason("length"))
        assert (await second)["meta_info"]["id"] == "x"


async def test_a_stopping_engine_is_a_503(client: Client, engine: FakeEngine) -> None:
    engine.health_status = "stopping"
    response = await client.post("/generate", json={"text": "a"})
    assert response.status == 503


async def test_a_failed_request_is_a_500_and_an_error_event_when_streamed(client: Client, engine: FakeEngine) -> None:
    engine.failure = FinishReason("abort", message="step failed: boom", status_code=500)
    response = await client.post("/generate", json={"text": "a"})
    assert response.status == 500
    assert (await response.json())["error"]["message"] == "step failed: boom"
    (event,) = await stream(client, text="a")
    assert event["error"]["message"] == "step failed: boom"


async def test_a_bug_in_a_handler_is_a_500_that_tells_no_secrets(client: Client, engine: FakeEngine) -> None:
    def broken() -> bool:
        raise RuntimeError("secret")

    engine.flush_cache = broken  # type: ignore[method-assign]
    response = await client.post("/flush_cache")
    assert response.status == 500
    assert "secret" not in await response.text()


# ---- clients that leave, and slow ones ----


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_disconnect_aborts_every_request_of_the_connection(engine: FakeEngine, is_stream: bool) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        body = json.dumps({"text": ["a", "b"], "rid": "gone", "stream": is_stream}).encode()
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await engine.until(lambda: len(engine.live) == 2)
        writer.close()
        await engine.until(lambda: not engine.live)
    assert engine.aborted == ["gone-0", "gone-1"]


async def test_a_token_is_sent_when_the_engine_gives_it_and_not_later(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        response = await client.post("/generate", json={"text": "a", "stream": True})
        assert response.status == 200  # the headers are there before the first token
        for word in ("one", " two"):
            engine.emit(engine.states[0], word)
            event = await asyncio.wait_for(response.content.readuntil(b"\n\n"), 60)
            assert json.loads(event.removeprefix(b"data: "))["text"].endswith(word)


async def test_answers_on_one_connection_make_one_write_a_step(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        response = await client.post("/generate", json={"text": ["a", "b", "c"], "stream": True})
        await engine.until(lambda: len(engine.live) == 3)
        for state in engine.states:
            engine.emit(state, "x")
        chunk, _ = await asyncio.wait_for(response.content.readchunk(), 60)
        assert len(events_of(chunk)) == 3


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_what_a_slow_reader_costs_is_bounded_and_it_misses_nothing(engine: FakeEngine, path: str) -> None:
    engine.is_manual, engine.context_length = True, 1 << 20
    body = json.dumps({"text": "a", "prompt": "a", "stream": True}).encode()
    pieces = [f"<{i}>" for i in range(20_000)]
    async with serving(engine) as client:
        reader, writer = await asyncio.open_connection(client.host, client.port, limit=1 << 12)
        head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (path.encode(), len(body)) + body)
        await engine.until(lambda: bool(engine.live))
        state, largest = engine.states[0], 0
        stream = state.sink.__self__.stream  # type: ignore[attr-defined]
        for piece in pieces:
            engine.emit(state, piece)
            await asyncio.sleep(0)
            if stream.is_direct or largest:
                largest = max(largest, stream.transport.get_write_buffer_size())
        assert largest > HIGH_WATER_BYTES  # the reader was slow indeed
        assert largest < 4 * HIGH_WATER_BYTES
        engine.finish(state, FinishReason("length"))
        answer = b""
        while block := await asyncio.wait_for(reader.read(1 << 16), 60):
            answer += block
        writer.close()
    _, _, chunked = answer.partition(b"\r\n\r\n")
    *events, done = events_of(unchunk(chunked))
    assert done == "[DONE]"
    assert len(events) < len(pieces)
    if path == "/generate":
        text = json.loads(events[-1])["text"]
    else:
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert text == "".join(pieces)


def unchunk(data: bytes) -> bytes:
    """Return the body of a response in chunked framing, which must be whole."""
    chunks, start = [], 0
    while True:
        end = data.index(b"\r\n", start)
        length = int(data[start:end], 16)
        start = end + 2 + length + 2
        assert data[start - 2 : start] == b"\r\n"
        chunks.append(data[end + 2 : start - 2])
        if not length:
            assert start == len(data)
            return b"".join(chunks)


async def test_an_http_1_0_client_gets_its_stream_without_chunks(client: Client) -> None:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    body = b'{"text": "a", "stream": true}'
    writer.write(b"POST /generate HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    _, _, answer = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
    writer.close()
    assert json.loads(events_of(answer)[-2])["text"] == "Hello, world"


async def test_a_connection_serves_another_request_after_a_stream(client: Client) -> None:
    reader, writer = await asyncio.open_connection(client.host, client.port)
    body = b'{"text": "a", "stream": true}'
    for _ in range(2):
        writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 60)
        assert b"[DONE]" in answer
    writer.close()


@pytest.mark.max_callback_ms(5000)  # it walks all objects there are
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_an_answer_took_is_given_back_without_the_garbage_collector(
    tiny_llama: Path, path: str, is_stream: bool
) -> None:
    native = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 8}}
    body = {"stream": is_stream} | (native if path == "/generate" else {"prompt": [5, 6, 7], "max_tokens": 8})

    def num_alive() -> Counter[str]:
        counts = Counter(map(type, gc.get_objects()))
        return Counter(work=counts[RequestState] + counts[Step] + counts[EventStream], asked=counts[Request])

    async with running_engine(tiny_llama) as engine:
        config = ServerConfig(model_path=str(tiny_llama), served_model_name=["tiny"])
        async with TestClient(TestServer(build_app(engine, config))) as client:
            gc.collect()
            gc.disable()
            try:
                before = num_alive()
                for _ in range(5):
                    async with client.post(path, json=body) as response:
                        assert response.status == 200
                        await response.read()
                async with asyncio.timeout(60):  # the last step is behind the answer, and may be named somewhere
                    while max((num_alive() - before).values(), default=0) > 1:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
            finally:
                gc.enable()


# ---- the routes about the server ----


async def test_health_follows_the_engine(client: Client, engine: FakeEngine) -> None:
    assert (await client.get("/health")).status == 200
    for status in ("starting", "stuck", "stopping"):
        engine.health_status = status
        response = await client.get("/health")
        assert response.status == 503
        assert (await response.json())["status"] == status
    assert not engine.requests  # health is not asked by generating


async def test_sagemaker_finds_its_two_routes(client: Client, engine: FakeEngine) -> None:
    assert (await client.get("/ping")).status == 200
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answers = [await (await client.post(path, json=chat)).json() for path in ("/invocations", "/v1/chat/completions")]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["object"] == "chat.completion"
    refused = await (await client.post("/invocations", json={"messages": 1})).json()
    assert refused["error"]["param"] == "messages"
    engine.health_status = "stuck"
    assert (await client.get("/ping")).status == 503


async def test_vertex_instances_are_prompts_and_its_parameters_everything_else(client: Client) -> None:
    parameters = {"sampling_params": {"max_new_tokens": 2}}
    texts = ["a", "b"]
    asked = {"instances": [{"text": text} for text in texts], "parameters": parameters}
    found = await (await client.post("/vertex_generate", json=asked)).json()
    plain = await (await client.post("/generate", json={"text": texts, **parameters})).json()
    assert [answer["text"] for answer in found["predictions"]] == [answer["text"] for answer in plain]
    one = await (await client.post("/vertex_generate", json={"instances": [{"input_ids": [5, 6]}]})).json()
    assert len(one["predictions"]) == 1
    wrongs: list[Any] = [[], [1], [{"text": "a"}, {"input_ids": [5]}], [{"text": "a", "image_data": "b"}], [{}]]
    for wrong in wrongs:
        response = await client.post("/vertex_generate", json={"instances": wrong})
        assert response.status == 400 and "instances" in await response.text()


async def test_health_generate_asks_an_idle_engine_for_a_token_and_trusts_a_busy_one(engine: FakeEngine) -> None:
    async with serving(engine) as client:
        assert (await client.get("/health_generate")).status == 200
        assert [request.rid.startswith("HEALTH_CHECK") for request in engine.requests] == [True]
        engine.is_manual = True
        busy = asyncio.create_task(client.post("/generate", json={"text": "a"}))
        await engine.until(lambda: bool(engine.live))
        assert (await client.get("/health_generate")).status == 200
        assert len(engine.requests) == 2
        engine.abort_all()
        await busy


async def test_model_info_and_server_info_have_two_names_each(client: Client) -> None:
    for path in ("/get_model_info", "/model_info"):
        info = await (await client.get(path)).json()
        assert (info["model_path"], info["is_generation"]) == ("fake-model", True)
        assert (info["model_type"], info["text_model_type"]) == ("fake_vl", "fake")
    for path in ("/get_server_info", "/server_info"):
        info = await (await client.get(path)).json()
        assert (info["max_total_num_tokens"], info["schedule_policy"]) == (1024, "lpm")
        assert info["internal_states"][0]["scheduler"]["num_held_tokens"] == 250


async def test_load_counts_requests_and_tokens_of_each_replica(client: Client, engine: FakeEngine) -> None:
    engine.num_replicas = 2
    load = {"num_reqs": 3, "num_waiting_reqs": 2, "num_tokens": 280, "num_pending_tokens": 30}
    assert await (await client.get("/get_load")).json() == [{"dp_rank": i, **load} for i in range(2)]
    info = await (await client.get("/server_info")).json()
    assert len(info["internal_states"]) == 2
    assert await (await client.get("/load")).json() == {"server_load": 3}
    assert await (await client.get("/version")).json() == {"version": info["version"]}


async def test_v1_loads_reports_each_replica_against_its_limits_as_sglang_does() -> None:
    engine = FakeEngine()
    engine.num_replicas = 2
    async with serving(engine) as client:
        answer = await (await client.get("/v1/loads")).json()
        assert [load["dp_rank"] for load in answer["loads"]] == [0, 1] and answer["dp_rank_count"] == 2
        scheduler, load = engine.stats().scheduler, answer["loads"][1]
        assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]) == (1, 2, 3)
        assert (load["num_used_tokens"], load["num_total_tokens"]) == (250, 280)
        assert load["max_total_num_tokens"] == scheduler.num_total_tokens and load["gen_throughput"] == 0.0
        assert load["token_usage"] == scheduler.usage
        assert load["max_running_requests"] == engine.max_running_requests // 2
        assert (answer["aggregate"]["total_reqs"], answer["aggregate"]["avg_token_usage"]) == (6, scheduler.usage)
        one = await (await client.get("/v1/loads", params={"dp_rank": "1", "include": "core,queues"})).json()
        assert [load["dp_rank"] for load in one["loads"]] == [1] and one["aggregate"]["total_reqs"] == 3
        for field, wrong in (("dp_rank", "2"), ("dp_rank", "x"), ("include", "core,all,"), ("format", "prometheus")):
            refused = await client.get("/v1/loads", params={field: wrong})
            assert refused.status == 400 and field in await refused.text()


async def test_the_cache_is_flushed_only_when_nothing_runs(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        for method in ("GET", "POST"):
            assert (await client.request(method, "/flush_cache")).status == 200
        busy = asyncio.create_task(client.post("/generate", json={"text": "a"}))
        await engine.until(lambda: bool(engine.live))
        response = await client.post("/flush_cache")
        assert response.status == 400
        assert "1 requests are running" in (await response.json())["error"]["message"]
        for timeout in ("-1", "nan", "soon", ""):
            response = await client.post("/flush_cache", params={"timeout": timeout})
            assert response.status == 400 and "timeout must be" in await response.text()
        tries: asyncio.Queue[bool] = asyncio.Queue()
        flush = engine.flush_cache

        def flush_cache() -> bool:
            tries.put_nowait(is_flushed := flush())
            return is_flushed

        engine.flush_cache = flush_cache  # type: ignore[method-assign]
        waiting = asyncio.create_task(client.post("/flush_cache?timeout=600"))
        assert [await tries.get() for _ in range(2)] == [False, False]
        engine.abort_all()
        await busy
        assert (await waiting).status == 200


async def test_a_rid_aborts_all_answers_made_of_it(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        task = asyncio.create_task(generate(client, text="a", rid="r", sampling_params={"n": 2}))
        await engine.until(lambda: len(engine.live) == 2)
        assert (await client.post("/abort_request", json={"rid": "r"})).status == 200
        reasons = [answer["meta_info"]["finish_reason"] for answer in await task]
        assert reasons == [{"type": "abort", "message": "aborted by the client", "status_code": 499}] * 2
        assert (await client.post("/abort_request", json={"rid": "unknown"})).status == 200
        assert (await client.post("/abort_request", json={})).status == 400


async def test_abort_all_ends_streams_too(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client:
        task = asyncio.create_task(stream(client, text="a"))
        await engine.until(lambda: bool(engine.live))
        await client.post("/abort_request", json={"abort_all": True})
        (event,) = await task
        assert event["meta_info"]["finish_reason"]["type"] == "abort"


async def test_text_becomes_tokens_and_back(client: Client) -> None:
    async def post(path: str, **body: Any) -> Any:
        return await (await client.post(path, json=body)).json()

    assert await post("/tokenize", prompt="Hi") == {"tokens": [72, 105], "count": 2, "max_model_len": 256}
    assert (await post("/v1/tokenize", prompt=["a", "bc"]))["count"] == [1, 2]
    assert await post("/detokenize", tokens=[72, 105]) == {"text": "Hi", "prompt": "Hi"}
    assert await post("/detokenize", tokens=[[72], [105]]) == {"text": ["H", "i"], "prompt": ["H", "i"]}
    rendered = await post("/tokenize", messages=[{"role": "user", "content": "Hi"}])
    assert rendered["prompt"] == "[user]Hi[assistant]"
    assert (await client.post("/tokenize", json={"prompt": [1]})).status == 400
    assert (await client.post("/detokenize", json={"tokens": "x"})).status == 400


async def test_metrics_are_there_when_enabled(engine: FakeEngine) -> None:
    async with serving(engine, enable_metrics=True) as client:
        await generate(client, text="a")
        text = await (await client.get("/metrics")).text()
    assert 'sglang:num_running_reqs{model_name="fake-model"} 1.0' in text
    assert 'sglang:prompt_tokens_total{model_name="fake-model"} 100.0' in text
    async with serving(engine) as client:
        assert (await client.get("/metrics")).status == 404


# ---- keys ----


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/generate", "/v1/models", "/get_server_info", "/metrics", "/tokenize", "/nope"])
async def test_a_key_protects_every_route_but_health(engine: FakeEngine, path: str) -> None:
    async with serving(engine, api_key="k", enable_metrics=True) as client:
        for headers in ({}, bearer("wrong"), {"Authorization": "k"}, bearer("k2")):
            response = await client.get(path, headers=headers)
            assert response.status == 401
            assert "Authorization" in (await response.json())["error"]["message"]
        assert (await client.get(path, headers=bearer("k"))).status != 401
        assert (await client.get("/health")).status == 200


async def test_an_admin_key_takes_over_the_admin_routes(engine: FakeEngine) -> None:
    async with serving(engine, api_key="k", admin_api_key="a") as client:
        assert (await client.post("/flush_cache", headers=bearer("k"))).status == 401
        assert (await client.post("/flush_cache", headers=bearer("a"))).status == 200
        assert (await client.get("/v1/models", headers=bearer("a"))).status == 200


async def test_keys_are_not_told(engine: FakeEngine) -> None:
    async with serving(engine, api_key="sesame", admin_api_key="open") as client:
        text = await (await client.get("/server_info", headers=bearer("sesame"))).text()
    assert "sesame" not in text
    assert "api_key" not in text


# ---- the request log ----


async def test_each_ended_request_is_a_line_when_asked_for(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "server.apis.request_logging"):
        async with serving(engine, log_requests=True, log_requests_level=2) as client:
            await generate(client, text="Hi", rid="mine")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "server.apis.request_logging"]
    assert "mine" in line
    assert "completion_tokens=12" in line
    assert "'Hello, world'" in line


# ---- the process ----


class SlowEngine(FakeEngine):
    """Takes about a second to say "Hello, world"."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__()

    async def start(self, on_progress: Any = print, on_tokenizer: Any = None) -> None:
        on_progress("weights loaded")

    def _step(self, state: RequestState) -> None:
        asyncio.get_running_loop().call_later(0.08, super()._step, state)


def run_main(monkeypatch: pytest.MonkeyPatch, engine_class: type, *argv: str) -> int:
    fake = types.ModuleType("engine.new_engine")
    monkeypatch.setattr(fake, "new_engine", engine_class, raising=False)
    monkeypatch.setitem(sys.modules, "engine.new_engine", fake)
    return main(["--model-path", "fake-model", *argv])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end_and_then_exits_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    answers: list[bytes] = []

    def is_up() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
            return True
        return False

    def be_a_client() -> None:
        url = f"http://127.0.0.1:{port}"
        wait_until(is_up)
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"text": "a", "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", body, headers), timeout=60) as response:
            answers.append(response.readline())
            os.kill(os.getpid(), number)
            answers.append(response.read())

    with reserved_port() as port:
        thread = threading.Thread(target=be_a_client)
        thread.start()
        status = run_main(monkeypatch, SlowEngine, "--port", str(port), "--skip-server-warmup")
        thread.join()
    assert status == 0
    assert b'"text":"Hello, world"' in answers[1]
    assert answers[1].endswith(b"data: [DONE]\n\n")
    shown = capsys.readouterr().err
    for part in ("weights loaded", f"http://127.0.0.1:{port}", "fake-model", "1,024 tokens", "curl"):
        assert part in shown


def test_a_taken_port_is_one_line_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_main(monkeypatch, SlowEngine, "--port", str(port)) == 1
    shown = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in shown
    assert "--port" in shown
    assert "Traceback" not in shown


def test_a_port_that_another_server_takes_while_this_one_loads_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))  # two may be bound to a port, as long as none listens
        port = other.getsockname()[1]

        class Slower(SlowEngine):
            async def start(self, on_progress: Any = None, on_tokenizer: Any = None) -> None:
                other.listen()

        assert run_main(monkeypatch, Slower, "--port", str(port), "--skip-server-warmup") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["my..host", "a" * 100])
def test_a_host_that_cannot_be_a_name_is_one_line(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, SlowEngine, "--host", host) == 1
    assert f"--host '{host}'" in capsys.readouterr().err


def test_a_bad_model_is_one_line_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoModel(SlowEngine):
        async def start(self, on_progress: Any = None, on_tokenizer: Any = None) -> None:
            raise ModelError("no folder [/nowhere]")

    assert run_main(monkeypatch, NoModel, "--port", "0") == 1
    shown = capsys.readouterr().err
    assert "no folder [/nowhere]" in shown
    assert "Traceback" not in shown


def test_a_missing_chat_template_is_one_line_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, SlowEngine, "--port", "0", "--chat-template", "nope") == 1
    assert "--chat-template nope" in capsys.readouterr().err


def test_a_missing_key_file_is_one_line_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Loaded(SlowEngine):
        async def start(self, on_progress: Any = None, on_tokenizer: Any = None) -> None:
            raise AssertionError("the keys come first")

    assert run_main(monkeypatch, Loaded, "--port", "0", "--api-key-file", "/nowhere") == 1
    assert "--api-key-file /nowhere: No such file or directory" in capsys.readouterr().err


class Unloaded(SlowEngine):
    """Has a tokenizer, and fails the test if it comes to its weights."""

    async def start(self, on_progress: Any = None, on_tokenizer: Any = None) -> None:
        on_tokenizer(self.tokenizer)
        raise AssertionError("the start must end before the weights are loaded")


@pytest.mark.parametrize("flag", ["--file-storage-path", "--crash-dump-folder"])
def test_a_folder_that_cannot_be_made_is_one_line_before_the_model_is_loaded(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_main(monkeypatch, Unloaded, "--port", "0", flag, str(tmp_path / "file" / "folder")) == 1
    assert f"{flag} {tmp_path}/file/folder: Not a directory" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("name", ["nope", "/no/such/template.jinja"])
def test_a_missing_chat_template_ends_the_start_before_the_weights_are_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, Unloaded, "--port", "0", "--chat-template", name) == 1
    assert f"--chat-template {name}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("is_given", [True, False])
def test_a_chat_template_that_does_not_parse_ends_the_start_before_the_weights_are_loaded(
    is_given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "fine\n{% for message in messages %}{{ message.content }"

    class Templated(Unloaded):
        async def start(self, on_progress: Any = None, on_tokenizer: Any = None) -> None:
            self.tokenizer.chat_template = None if is_given else broken
            check = functools.partial(Tokenizer.check_chat_template, self.tokenizer)  # type: ignore[arg-type]
            monkeypatch.setattr(self.tokenizer, "check_chat_template", check)
            await super().start(on_progress, on_tokenizer)

    file = tmp_path / "broken.jinja"
    file.write_text(broken)
    assert run_main(monkeypatch, Templated, "--port", "0", *(["--chat-template", str(file)] if is_given else [])) == 1
    shown = capsys.readouterr().err
    assert "does not parse: line 2: unexpected '}'" in shown
    assert (f"--chat-template {file}" if is_given else "the model's chat template") in shown


def test_a_model_that_cannot_generate_is_found_by_the_warm_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(SlowEngine):
        def __init__(self, config: ServerConfig) -> None:
            super().__init__(config)
            self.failure = FinishReason("abort", message="not finite", status_code=500)

    assert run_main(monkeypatch, Broken, "--port", "0") == 1
    assert "not finite" in capsys.readouterr().err


# ---- the command line ----


def test_flags_have_sglangs_names_aliases_and_prefixes() -> None:
    flags = "--disable-radix --incremental-streaming-output --mem-frac 0.5 --cuda-graph-bs 1 4"
    config = parse_args(["--model", "m", *flags.split()])
    assert (config.model_path, config.disable_radix_cache, config.stream_output) == ("m", True, True)
    assert (config.mem_fraction_static, config.cuda_graph_bs) == (0.5, [1, 4])
    assert (config.host, config.port) == ("127.0.0.1", 30000)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "port: 1234\napi-key: abc\ndisable_radix_cache: true\nchunked-prefill-size: -1\ncuda-graph-bs: [1, 2]\n"
    )
    config = parse_args(["--config", str(file), "--port", "99"])
    assert (config.port, config.api_key, config.disable_radix_cache) == (99, "abc", True)
    assert (config.chunked_prefill_size, config.cuda_graph_bs) == (-1, [1, 2])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prot", "1"], "did you mean --port?"),
        (["--port", "x"], "invalid int value"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--dtype", "int3"], "invalid choice"),
        (["stray"], "unknown argument: stray"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["--api-key", ""], "--api-key is empty"),
        (["--admin-api-key="], "--admin-api-key is empty"),
        (["--max-file-bytes", "0"], "--max-file-bytes must be at least 1, got 0"),
        (["--drain-timeout", "nan"], "--drain-timeout must be a number of seconds, at least 0, got nan"),
        (["--watchdog-timeout", "-1"], "--watchdog-timeout must be a number of seconds, at least 0, got -1"),
    ],
)
def test_a_wrong_flag_is_a_clear_error(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_args(argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_option_in_the_file_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("prot: 1\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(file)])
    assert "unknown option prot; did you mean port?" in capsys.readouterr().err
    file.write_bytes(b"host: \xff\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(file)])
    assert f"--config {file}: unacceptable character" in capsys.readouterr().err


def test_help_names_every_option_and_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name in ServerConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    for group in ("model:", "memory:", "HTTP server:", "API:"):
        assert group in text


async def test_integers_of_any_length_in_tools_and_calls_are_no_error(client: Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 10**30}}}
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 10**30}}}]}
    messages = [{"role": "user", "content": "a"}, called, {"role": "tool", "content": "1"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    answer = await client.post("/v1/chat/completions", json={"messages": messages, "tools": tools})
    assert answer.status == 200, await answer.text()
    assert json_of({"a": 10**30}) == f'{{"a":{10**30}}}'  # as models that are told of tools in a text read it

"""One shape for every API's answer: what streams adds up to what is whole, and a token enters few functions."""

import asyncio
import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from engine.request import SamplingParams
from engine.state import Delta, FinishReason, Logprobs, RequestState
from server.apis.answer import Answer
from server.apis.openai_answers import ChatAnswer, CompletionAnswer, Envelope
from server.http.live import Options, make_requests
from server.http.sse import COMMENT, EventStream
from server.parsers import AnswerDelta, AnswerParser
from server.reading.chat import ChatTurn
from tests.fake_engine import PARSERS, THOUGHT_AND_CALL, FakeEngine, FakeTokenizer, serving

MESSAGES = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
Said = tuple[str, str, str]  # reasoning, text, arguments of the call


def values_of(stream: bytes) -> list[Any]:
    """Return the JSON of each event, or of each line."""
    lines = [line.removeprefix("data: ") for line in stream.decode().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def chat_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    def said(messages: list[Any]) -> Said:
        calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]
        texts = [message.get("content") or "" for message in messages]
        return "".join(message.get("reasoning", "") for message in messages), "".join(texts), "".join(calls)

    deltas = [choice["delta"] for event in stream for choice in event["choices"]]
    return said([whole["choices"][0]["message"]]), said(deltas)


def messages_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    blocks = whole["content"]
    calls = [block["input"] for block in blocks if block["type"] == "tool_use"]
    deltas = [event["delta"] for event in stream if event["type"] == "content_block_delta"]

    def joined(parts: list[Any], name: str) -> str:
        return "".join(part.get(name, "") for part in parts)

    streamed = joined(deltas, "partial_json")
    return (joined(blocks, "thinking"), joined(blocks, "text"), json.dumps(calls[0])), (
        joined(deltas, "thinking"),
        joined(deltas, "text"),
        json.dumps(json.loads(streamed)),
    )


def responses_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    def said(items: list[Any]) -> Said:
        texts = {"reasoning": "", "message": "", "function_call": ""}
        for item in items:
            texts[item["type"]] += item.get("arguments") or item["content"][0]["text"]
        return texts["reasoning"], texts["message"], texts["function_call"]

    grown = {"reasoning_text": "", "output_text": "", "function_call_arguments": ""}
    for event in stream:
        _, name, *rest = event["type"].split(".")
        if rest == ["delta"]:
            grown[name] += event["delta"]
    assert said(stream[-1]["response"]["output"]) == tuple(grown.values())
    return said(whole["output"]), said(stream[-1]["response"]["output"])


def ollama_said(whole: Any, stream: list[Any]) -> tuple[Said, Said]:
    def said(lines: list[Any]) -> Said:
        messages = [line["message"] for line in lines]
        calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]
        thinking = "".join(message.get("thinking", "") for message in messages)
        return thinking, "".join(message["content"] for message in messages), json.dumps(calls)

    return said([whole]), said(stream)


APIS: dict[str, tuple[dict[str, Any], Callable[[Any, list[Any]], tuple[Said, Said]]]] = {
    "/v1/chat/completions": ({"messages": MESSAGES, "tools": [TOOL]}, chat_said),
    "/v1/messages": (
        {
            "messages": MESSAGES,
            "max_tokens": 200,
            "thinking": {"type": "adaptive"},
            "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
        },
        messages_said,
    ),
    "/v1/responses": ({"input": "Hi", "tools": [{"type": "function", **FUNCTION}]}, responses_said),
    "/api/chat": ({"messages": MESSAGES, "tools": [TOOL], "think": True}, ollama_said),
}


@pytest.mark.parametrize("path", APIS)
async def test_a_streamed_answer_adds_up_to_the_whole_one(path: str) -> None:
    body, said = APIS[path]
    async with serving(FakeEngine(THOUGHT_AND_CALL), **PARSERS) as client:
        response = await client.post(path, json={**body, "stream": False})
        whole = await response.json()
        response = await client.post(path, json={**body, "stream": True})
        stream = values_of(await response.read())
    from_whole, from_stream = said(whole, stream)
    assert from_whole == from_stream
    assert from_whole[:2] == ("Where?", "Let me look.")
    assert "Oslo" in from_whole[2]


@pytest.mark.parametrize("path", [*APIS, "/v1/completions", "/generate"])
async def test_a_stream_that_fails_after_it_began_says_so_in_its_last_event(path: str) -> None:
    engine = FakeEngine(is_manual=True)
    body = APIS[path][0] if path in APIS else {"text" if path == "/generate" else "prompt": "Hi"}
    async with serving(engine) as client:
        task = asyncio.create_task(client.post(path, json={**body, "stream": True}))
        await engine.until(lambda: bool(engine.live))
        response = await task
        engine.emit(engine.states[0], "Hello")
        engine.finish(engine.states[0], FinishReason("abort", message="the step failed", status_code=500))
        *_, last = values_of(await response.read())
    assert response.status == 200
    assert "the step failed" in json.dumps(last.get("error") or last["response"]["error"])


@pytest.mark.parametrize("path", APIS)
async def test_a_stream_whose_end_cannot_be_written_says_so_in_its_last_event(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def finish(self: AnswerParser) -> AnswerDelta:
        raise IndexError("no such mark")

    monkeypatch.setattr(AnswerParser, "finish", finish)
    engine = FakeEngine(is_manual=True)
    async with serving(engine, **PARSERS) as client:
        task = asyncio.create_task(client.post(path, json={**APIS[path][0], "stream": True}))
        await engine.until(lambda: bool(engine.live))
        response = await task
        engine.emit(engine.states[0], "Hello")
        engine.finish(engine.states[0], FinishReason("stop"))
        *_, last = values_of(await response.read())
    assert "internal server error" in json.dumps(last.get("error") or last["response"]["error"])
    assert "no such mark" in caplog.text


FIRST = {
    "/v1/chat/completions": b'"delta":{"role":"assistant","content":""',
    "/v1/messages": b"event: message_start",
    "/v1/responses": b"event: response.created",
}


@pytest.mark.parametrize("path", FIRST)
async def test_a_client_hears_the_beginning_before_the_first_token(path: str) -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine, **PARSERS) as client:
        response = await client.post(path, json={**APIS[path][0], "stream": True})
        async with asyncio.timeout(60):
            first = await response.content.readuntil(b"\n\n")
        assert FIRST[path] in first
        assert not engine.states[0].output_ids
        engine.emit(engine.states[0], "Hello")
        engine.finish(engine.states[0], FinishReason("stop"))
        rest = await response.read()
    assert FIRST[path] not in rest and b"Hello" in rest


class FullEngine(FakeEngine):
    """Its requests wait for their turn."""

    def submit(self, state: RequestState) -> None:
        super().submit(state)
        state.times.scheduled, state.num_cached_tokens = 0.0, 0


async def test_message_start_waits_a_moment_for_what_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its usage is true: what is cached is known once the request has its turn."""
    monkeypatch.setattr("server.apis.anthropic.MAX_SILENCE_S", 3600.0)
    engine = FullEngine(is_manual=True)
    async with serving(engine) as client:
        response = await client.post("/v1/messages", json={**APIS["/v1/messages"][0], "stream": True})
        [state] = engine.states
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await response.content.readany()
        state.times.scheduled, state.num_cached_tokens = 1.0, 12
        async with asyncio.timeout(60):
            first = await response.content.readuntil(b"\n\n")
        usage = values_of(first)[0]["message"]["usage"]
        assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (12, state.prompt_len - 12)
        engine.finish(state, FinishReason("stop"))
        await response.read()


async def test_message_start_does_not_wait_for_the_end_of_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.apis.anthropic.MAX_SILENCE_S", 0.02)
    engine = FullEngine(is_manual=True)
    async with serving(engine) as client:
        response = await client.post("/v1/messages", json={**APIS["/v1/messages"][0], "stream": True})
        async with asyncio.timeout(60):
            assert b"message_start" in await response.content.readuntil(b"\n\n")
        engine.finish(engine.states[0], FinishReason("stop"))
        await response.read()


PINGS = {"/v1/messages": b"event: ping", "/api/chat": b'"content":""},"done":false'}


@pytest.mark.parametrize("path", [*APIS, "/v1/completions", "/generate"])
async def test_a_client_that_waits_gets_signs_of_life(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.sse.QUIET_S", 0.02)
    engine = FakeEngine(is_manual=True)
    body = APIS[path][0] if path in APIS else {"text" if path == "/generate" else "prompt": "Hi"}
    async with serving(engine) as client:
        response = await client.post(path, json={**body, "stream": True})
        sign, seen = PINGS.get(path, COMMENT), b""
        async with asyncio.timeout(60):
            while seen.count(sign) < 3:
                seen += await response.content.readany()
        engine.emit(engine.states[0], "Hello")
        engine.finish(engine.states[0], FinishReason("stop"))
        rest = await response.read()
    assert b"Hello" in rest
    for line in (seen + rest).splitlines():  # every line is one that clients know
        assert not line or line.startswith((b"data: ", b"event: ", b":", b"{"))


async def test_a_stream_that_speaks_gets_no_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.sse.QUIET_S", 3600.0)
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client:
        response = await client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
        stream = engine.states[0].sink.__self__.stream  # type: ignore[attr-defined]
        for _ in range(3):
            engine.emit(engine.states[0], "x")
            await asyncio.sleep(0)
            stream._keep_alive()
        engine.finish(engine.states[0], FinishReason("stop"))
        assert COMMENT not in await response.read()


class Connection:
    """Takes bytes, and is never full."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return 0


async def test_a_token_of_plain_text_enters_three_functions_and_makes_one_write() -> None:
    answer: Answer
    turn = ChatTurn("Hi", [1], SamplingParams(), Options(stream=True), None)
    [request] = make_requests(["r"], turn.input_ids, turn.params, turn.options)
    state = RequestState(request)
    answer = ChatAnswer(0, state, Envelope("r", "m", "o", "c"), FakeTokenizer(), turn=turn)
    stream, connection = EventStream([answer]), Connection()
    stream.transport, stream.is_direct = connection, True  # type: ignore[assignment]
    answer.sink(Delta(state, "first", [1]))
    entered: list[str] = []

    def observe(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/server/" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_name)

    connection.written.clear()
    delta = Delta(state, "more", [2])
    sys.setprofile(observe)
    try:
        answer.sink(delta)
    finally:
        sys.setprofile(None)
    assert entered == ["sink", "text", "write"]
    assert len(connection.written) == 1


@pytest.mark.parametrize("is_chat", [True, False])
def test_log_probabilities_read_as_they_come_are_what_they_are_at_the_end(is_chat: bool) -> None:
    turn = ChatTurn("Hi", [1], SamplingParams(), Options(return_logprob=True, top_logprobs_num=2), None)

    def whole(parts: list[Logprobs]) -> Any:
        [request] = make_requests(["r"], turn.input_ids, turn.params, turn.options)
        state, envelope = RequestState(request), Envelope("r", "m", "o", "c")
        answer: ChatAnswer | CompletionAnswer
        if is_chat:
            answer = ChatAnswer(0, state, envelope, FakeTokenizer(), turn=turn)
        else:
            answer = CompletionAnswer(0, state, envelope, FakeTokenizer(), is_echo=False, num_logprobs=2)
        *early, last = parts
        read = answer.reader_of_logprobs()
        assert read is not None
        for part in early:
            read(part)
        return answer.read_whole(Delta(state, "Hello", list(b"Hello"), FinishReason("length"), last))["logprobs"]

    def some(tokens: bytes) -> Logprobs:
        return Logprobs([(-0.1, token) for token in tokens], [[(-0.1, token), (-2.0, 65)] for token in tokens])

    at_once = whole([some(b"Hello")])
    assert at_once == whole([some(b"He"), some(b"l"), some(b"lo")]) == whole([some(b"Hello"), Logprobs()])
    tokens = [entry["token"] for entry in at_once["content"]] if is_chat else at_once["tokens"]
    assert tokens == list("Hello")


def test_what_is_echoed_is_spelled_at_the_end_since_its_offsets_come_first() -> None:
    [request] = make_requests(["r"], [1], SamplingParams(), Options(return_logprob=True))
    state, envelope = RequestState(request), Envelope("r", "m", "o", "c")
    answer = CompletionAnswer(0, state, envelope, FakeTokenizer(), is_echo=True, num_logprobs=2)
    assert answer.reader_of_logprobs() is None
